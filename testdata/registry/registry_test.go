package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"distkit/testdata/registry/faults"
	"distkit/testdata/registry/layouts"
)

// layout writes an OCI layout: one manifest, which has the tags, and one blob.
func layout(t *testing.T, dir string, blob []byte, tags ...string) (manifest, digest string) {
	t.Helper()
	write := func(data []byte) string {
		hex := fmt.Sprintf("%x", sha256.Sum256(data))
		put(t, filepath.Join(dir, "blobs/sha256", hex), data)
		return "sha256:" + hex
	}
	digest = write(blob)
	body := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",`+
		`"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":%d},"layers":[]}`, digest, len(blob))
	manifest = write([]byte(body))
	var list []any
	for _, tag := range tags {
		list = append(list, map[string]any{
			"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": len(body),
			"annotations": map[string]string{"org.opencontainers.image.ref.name": tag},
		})
	}
	index, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": list})
	if err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`))
	put(t, filepath.Join(dir, "index.json"), index)
	return manifest, digest
}

// put replaces a file as a store does: it writes a temporary file and renames it.
func put(t *testing.T, file string, data []byte) {
	t.Helper()
	err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file+".new", data, 0o444), os.Rename(file+".new", file))
	if err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, url, rng string) (*http.Response, []byte, error) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if rng != "" {
		req.Header.Set("Range", rng)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return resp, data, err
}

func TestLayoutsChangeUnderTheServer(t *testing.T) {
	dir := t.TempDir()
	srv := httptest.NewServer(layouts.New(dir, false))
	defer srv.Close()
	url := srv.URL + "/v2/library/redis/manifests/"
	for i, tags := range [][]string{{"one"}, {"one", "two"}, {"three"}} {
		if resp, _, err := get(t, url+tags[len(tags)-1], ""); err != nil || resp.StatusCode != http.StatusNotFound {
			t.Fatalf("before the layout is there: %v %v", resp, err)
		}
		blob := []byte(fmt.Sprint("blob ", i))
		_, digest := layout(t, filepath.Join(dir, "library/redis"), blob, tags...)
		for _, tag := range tags {
			if resp, _, err := get(t, url+tag, ""); err != nil || resp.StatusCode != http.StatusOK {
				t.Errorf("tag %s just written: %v %v", tag, resp, err)
			}
		}
		resp, data, err := get(t, srv.URL+"/v2/library/redis/blobs/"+digest, "")
		if err != nil || resp.StatusCode != http.StatusOK || !bytes.Equal(data, blob) {
			t.Errorf("blob: %v %q %v", resp, data, err)
		}
	}
	if resp, _, _ := get(t, url+"one", ""); resp.StatusCode != http.StatusNotFound {
		t.Errorf("a tag that is gone: status %d", resp.StatusCode)
	}
}

func TestFaults(t *testing.T) {
	dir := t.TempDir()
	blob := bytes.Repeat([]byte("0123456789"), 10)
	_, digest := layout(t, filepath.Join(dir, "x"), blob, "latest")
	h := faults.New(layouts.New(dir, true))
	srv := httptest.NewServer(h)
	defer srv.Close()
	url := srv.URL + "/v2/x/blobs/" + digest

	tests := []struct {
		fault, rng string
		status     int
		want       string
		length     int64
		broken     bool
	}{
		{"delay=1ms", "", 200, string(blob), 100, false},
		{"cut=30", "", 200, string(blob[:30]), 100, true},
		{"cut=0", "", 200, "", 100, true},
		{"short=30", "", 200, string(blob[:30]), -1, false},
		{"status=429,3", "", 429, "", 0, false},
		{"status=503", "", 503, "", 0, false},
		{"ignore-range", "bytes=90-", 200, string(blob), 100, false},
		{"wrong-start=10", "bytes=90-", 206, string(blob[80:]), 20, false},
		{"lying-start=5", "bytes=90-", 206, "5678901234", 10, false},
		{"drip=100000", "bytes=90-", 206, string(blob[90:]), 10, false},
		{"delay=1ms path=/manifests/", "", 200, string(blob), 100, false},
	}
	for _, tt := range tests {
		t.Run(tt.fault, func(t *testing.T) {
			f, err := faults.Parse(tt.fault + " times=1")
			if err != nil {
				t.Fatal(err)
			}
			h.Clear()
			h.Add(f)
			resp, data, err := get(t, url, tt.rng)
			if resp == nil || resp.StatusCode != tt.status || string(data) != tt.want || resp.ContentLength != tt.length || (err != nil) != tt.broken {
				t.Errorf("got %+v %q %v", resp, data, err)
			}
			if resp, data, err := get(t, url, ""); err != nil || resp.StatusCode != 200 || !bytes.Equal(data, blob) {
				t.Errorf("after the one time: %v %q %v", resp, data, err)
			}
		})
	}
	t.Run("wrong-bytes", func(t *testing.T) {
		h.Clear()
		h.Add(faults.Fault{Kind: "wrong-bytes"})
		if _, data, err := get(t, url, ""); err != nil || len(data) != 100 || bytes.Equal(data, blob) {
			t.Errorf("got %q %v", data, err)
		}
	})
	t.Run("html", func(t *testing.T) {
		h.Clear()
		h.Add(faults.Fault{Kind: "html"})
		if resp, data, err := get(t, url, ""); err != nil || resp.StatusCode != 200 || !bytes.HasPrefix(data, []byte("<!DOCTYPE")) {
			t.Errorf("got %q %v", data, err)
		}
	})
	for _, bad := range []string{"", "burn", "cut", "cut=x", "drip=1 for=ever", "delay=1"} {
		if _, err := faults.Parse(bad); err == nil {
			t.Errorf("%q is taken for a fault", bad)
		}
	}
}

func TestStats(t *testing.T) {
	dir := t.TempDir()
	_, digest := layout(t, filepath.Join(dir, "x"), make([]byte, 1000), "latest")
	srv := httptest.NewServer(faults.New(layouts.New(dir, true)))
	defer srv.Close()
	for range 3 {
		if _, _, err := get(t, srv.URL+"/v2/x/blobs/"+digest, "bytes=900-"); err != nil {
			t.Fatal(err)
		}
	}
	resp, err := http.Head(srv.URL + "/v2/x/manifests/latest")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	resp, _, err = get(t, srv.URL+"/_stats", "")
	if err != nil || resp.StatusCode != 200 {
		t.Fatal(resp, err)
	}
	_, data, err := get(t, srv.URL+"/_stats", "")
	var stats map[string]faults.Count
	if err := errors.Join(err, json.Unmarshal(data, &stats)); err != nil {
		t.Fatal(err)
	}
	if stats["blobs"] != (faults.Count{Get: 3, Bytes: 300}) || stats["manifests"] != (faults.Count{Head: 1}) {
		t.Errorf("got %s", data)
	}
	if _, log, err := get(t, srv.URL+"/_log", ""); err != nil || strings.Count(string(log), `"range":"bytes=900-"`) != 3 {
		t.Errorf("log: %s %v", log, err)
	}
}

// TestProcess checks that the program ends cleanly, in each way in which it can be asked to end.
func TestProcess(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "registry")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, tt := range map[string]struct {
		flag string
		end  func(*exec.Cmd, io.Closer) error
	}{
		"TERM":  {"--read-only", func(c *exec.Cmd, _ io.Closer) error { return c.Process.Signal(unix.SIGTERM) }},
		"stdin": {"--with-stdin", func(_ *exec.Cmd, in io.Closer) error { return in.Close() }},
	} {
		t.Run(name, func(t *testing.T) {
			ready := filepath.Join(t.TempDir(), "ready")
			c := exec.Command(bin, "--dir", t.TempDir(), "--ready", ready, tt.flag)
			c.Stderr = os.Stderr
			in, err := c.StdinPipe()
			if err == nil {
				err = c.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Process.Kill() }()
			addr := waitReady(t, ready)
			if resp, _, err := get(t, "http://"+addr+"/v2/", ""); err != nil || resp.StatusCode != 200 {
				t.Fatalf("%v %v", resp, err)
			}
			if err := tt.end(c, in); err != nil {
				t.Fatal(err)
			}
			if err := c.Wait(); err != nil {
				t.Errorf("it ended with %v", err)
			}
		})
	}
	t.Run("parent", func(t *testing.T) {
		ready := filepath.Join(t.TempDir(), "ready")
		// The shell stays the parent until its own standard input ends. It has the write end of a pipe that the
		// registry inherits, so end of file on the pipe means that both have ended.
		shell := exec.Command("sh", "-c", `"$0" --dir "$1" --ready "$2" --with-parent & read -r _; exit 0`, bin, t.TempDir(), ready)
		in, err := shell.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		gone, err := shell.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := shell.Start(); err != nil {
			t.Fatal(err)
		}
		waitReady(t, ready)
		in.Close()
		if _, err := io.ReadAll(gone); err != nil {
			t.Error(err)
		}
		_ = shell.Wait()
	})
}

func waitReady(t *testing.T, file string) string {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if data, err := os.ReadFile(file); err == nil {
			return strings.TrimSpace(string(data))
		}
	}
	t.Fatalf("%s did not appear", file)
	return ""
}
