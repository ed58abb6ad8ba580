package cmd_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// storeMemory is the limit for a command that moves or lists blobs, however large or many they are.
const storeMemory = 20 << 20

// checkMemory fails the test if a running process has ever had more than most bytes of memory. (wait4's figure for a
// child includes what its parent had at the fork.)
func checkMemory(t *testing.T, c *exec.Cmd, most int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.Process.Pid))
	_, text, ok := bytes.Cut(b, []byte("VmHWM:"))
	var kilobytes int
	if n, serr := fmt.Sscanf(string(text), "%d kB", &kilobytes); err != nil || !ok || n != 1 {
		t.Fatalf("no VmHWM: %v, %v", err, serr)
	}
	took := kilobytes << 10
	t.Logf("%q: %.1f MiB", c.Args, float64(took)/(1<<20))
	if took > most {
		t.Errorf("%q took %d bytes of memory, more than %d", c.Args, took, most)
	}
}

// Data that pass through a pipe take no more memory the more they are. Memory is checked before the end, since
// afterwards the process is gone.
func TestMemoryIsBounded(t *testing.T) {
	const size = 192 << 20
	root := filepath.Join(t.TempDir(), "store")
	zeros := make([]byte, 1<<20)
	sum := sha256.New()
	for range size / len(zeros) {
		sum.Write(zeros)
	}
	digest := fmt.Sprintf("sha256:%x", sum.Sum(nil))
	into := func(args ...string) {
		t.Helper()
		c := exec.Command(filepath.Join(bin, args[0]), append(args[1:], "--root", root)...)
		c.Stderr = os.Stderr
		var out bytes.Buffer
		c.Stdout = &out
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		for range size / len(zeros) {
			if _, err := in.Write(zeros); err != nil {
				t.Fatal(err)
			}
		}
		checkMemory(t, c, storeMemory)
		if err := in.Close(); err != nil {
			t.Error(err)
		}
		if err := c.Wait(); err != nil || out.String() != fmt.Sprintf("%s\t%d\n", digest, size) {
			t.Errorf("%q: %v, %q", args, err, out.String())
		}
	}
	from := func(atLeast int64, args ...string) {
		t.Helper()
		c := exec.Command(filepath.Join(bin, args[0]), append(args[1:], "--root", root)...)
		c.Stderr = os.Stderr
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		// More than a pipe holds is left, so the process can't have ended.
		n, err := io.CopyN(io.Discard, out, atLeast-2<<20)
		if err != nil {
			t.Errorf("%q: %d bytes, %v", args, n, err)
		}
		checkMemory(t, c, storeMemory)
		rest, err := io.Copy(io.Discard, out)
		if err := c.Wait(); err != nil || n+rest < atLeast {
			t.Errorf("%q: %d bytes, %v", args, n+rest, err)
		}
		if err != nil {
			t.Error(err)
		}
	}
	into("dist-ingest", "ref")
	from(size, "dist-cat", digest)
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
	into("dist-ingest", "ref", "--expected-digest", digest)
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
	// Hard links to one file, which are made quickly.
	const blobs = 60_000
	dir := filepath.Join(root, "blobs", "sha256")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "empty")
	if err := os.WriteFile(file, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	for i := range blobs {
		to := filepath.Join(dir, fmt.Sprintf("%064x", i))
		if err := os.Link(file, to); err != nil {
			t.Fatal(err)
		}
	}
	from(blobs*72, "dist-list", "-q")
	from(blobs*72, "dist-list")
}

// fetchMemory is the limit for dist-fetch, with TLS or without.
const fetchMemory = 16 << 20

// Fetching a blob takes the same memory, whatever its size.
func TestMemoryOfFetch(t *testing.T) {
	const size = 192 << 20
	zeros := make([]byte, 1<<20)
	sum := sha256.New()
	for range size / len(zeros) {
		sum.Write(zeros)
	}
	digest := fmt.Sprintf("sha256:%x", sum.Sum(nil))
	registry := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(size))
		for range size / len(zeros) {
			if _, err := w.Write(zeros); err != nil {
				return
			}
		}
	})
	plain := httptest.NewServer(registry)
	defer plain.Close()
	secure := httptest.NewUnstartedServer(registry)
	secure.EnableHTTP2 = true
	secure.StartTLS()
	defer secure.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, server := range []*httptest.Server{plain, secure} {
		for _, flags := range [][]string{nil, {"--no-verify"}, {"--parts", "4"}} {
			trust := "--ca=" + ca
			if server == plain {
				trust = "--plain-http"
			}
			c := exec.Command(filepath.Join(bin, "dist-fetch"), append(flags, trust, server.Listener.Addr().String()+"/x", digest)...)
			c.Stderr = os.Stderr
			out, err := c.StdoutPipe()
			if err == nil {
				err = c.Start()
			}
			if err != nil {
				t.Fatal(err)
			}
			// More than a pipe and the pieces hold is left, so the process can't have ended.
			n, err := io.CopyN(io.Discard, out, size-16<<20)
			if err == nil {
				checkMemory(t, c, fetchMemory)
			}
			rest, rerr := io.Copy(io.Discard, out)
			if werr := c.Wait(); err != nil || rerr != nil || werr != nil || n+rest != size {
				t.Errorf("%s %q: %d bytes, %v, %v, %v", server.URL, flags, n+rest, err, rerr, werr)
			}
		}
	}
}

// A list of an image's files takes some 35 bytes of memory for each, with names of 14 bytes that differ in the last ones, beside what every
// command takes.
func TestMemoryOfAListOfFiles(t *testing.T) {
	for _, args := range [][]string{{"dist-ls", "-lR", "-"}, {"dist-du", "-a", "-"}} {
		t.Run(args[0], func(t *testing.T) {
			t.Parallel()
			listFiles(t, args...)
		})
	}
}

func listFiles(t *testing.T, args ...string) {
	const files, most = 250_000, 25 << 20
	c := exec.Command(filepath.Join(bin, args[0]), args[1:]...)
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() {
		b := bufio.NewWriterSize(in, 1<<20)
		w := tar.NewWriter(b)
		for i := range files {
			if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("usr/share/d%05d/file%08d.h", i/100, i), ModTime: time.Unix(int64(i), 0)}); err != nil {
				written <- err
				return
			}
		}
		written <- errors.Join(w.Close(), b.Flush(), in.Close())
	}()
	r := bufio.NewReader(out)
	if _, err := r.ReadString('\n'); err != nil { // when everything has been read
		t.Fatal(err)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	checkMemory(t, c, most)
	n := 1
	for ; err == nil; n++ {
		_, err = r.ReadSlice('\n')
	}
	if err := c.Wait(); err != nil || n < files {
		t.Errorf("%d lines, %v", n, err)
	}
}
