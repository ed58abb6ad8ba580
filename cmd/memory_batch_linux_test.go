package cmd_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"distkit/batch"

	"github.com/opencontainers/go-digest"
)

// batchMemory is the limit for a batch command, however many requests or contents are sent ahead.
const batchMemory = 32 << 20

// batchOf starts a batch command and returns a client for it.
func batchOf(t *testing.T, args ...string) (*exec.Cmd, *batch.Client) {
	t.Helper()
	c := exec.Command(filepath.Join(bin, args[0]), append([]string{"--batch", "--plain-http"}, args[1:]...)...)
	c.Stderr = os.Stderr
	in, err1 := c.StdinPipe()
	out, err2 := c.StdoutPipe()
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	client := batch.NewClient(out, in)
	client.Unverified = true
	return c, client
}

// checkBatchMemory checks the memory of a batch command, and kills it.
func checkBatchMemory(t *testing.T, c *exec.Cmd) {
	t.Helper()
	checkMemory(t, c, batchMemory)
	if err := c.Process.Kill(); err != nil { // the rest is not needed, and the registry waits for it
		t.Error(err)
	}
	_ = c.Wait()
}

// A thousand requests are sent ahead, for large blobs and for manifests of almost the largest size.
func TestMemoryOfBatchFetch(t *testing.T) {
	const size, manifestSize = 10 << 20, 8 << 20
	zeros := make([]byte, size)
	blob := digest.FromBytes(zeros).String()
	manifest := []byte(`{"schemaVersion":2,"layers":[],"x":"` + strings.Repeat("x", manifestSize-40) + `"}`)
	manifestDigest := digest.FromBytes(manifest).String()
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		content := zeros
		if strings.Contains(r.URL.Path, "/manifests/") {
			content = manifest
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		_, _ = w.Write(content)
	}))
	defer registry.Close()
	for _, object := range []struct{ digest, hint string }{
		{blob, "mediatype:application/octet-stream"}, {manifestDigest, "mediatype:application/vnd.oci.image.manifest.v1+json"},
	} {
		c, client := batchOf(t, "dist-fetch", registry.Listener.Addr().String()+"/x")
		pending := make(chan *batch.Pending, 1000)
		go func() {
			defer close(pending)
			for range cap(pending) {
				p, err := client.Request(object.digest, object.hint)
				if err != nil {
					return // the command was killed
				}
				pending <- p
			}
		}()
		for range 16 {
			o, err := (<-pending).Wait(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, o); err != nil || n < manifestSize-10 {
				t.Fatal(n, err)
			}
			o.Close()
		}
		checkBatchMemory(t, c)
	}
}

// Blobs are sent while the registry is storing earlier ones.
func TestMemoryOfBatchPut(t *testing.T) {
	const size = 24 << 20
	registry := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodHead:
			w.WriteHeader(http.StatusNotFound)
		case http.MethodPost:
			w.Header().Set("Location", "/v2/x/blobs/uploads/1")
			w.WriteHeader(http.StatusAccepted)
		default:
			_, _ = io.Copy(io.Discard, r.Body)
			w.WriteHeader(http.StatusCreated)
		}
	}))
	defer registry.Close()
	c, client := batchOf(t, "dist-put", registry.Listener.Addr().String()+"/x")
	var all sync.WaitGroup
	for i := range 12 {
		content := make([]byte, size>>(i%3*8)) // large, small and tiny ones in turn
		content[0] = byte(i)
		for _, hints := range [][]string{{"mediatype:a/b", fmt.Sprintf("size:%d", len(content))}, {"mediatype:a/b"}} {
			all.Go(func() {
				got, err := client.Put(t.Context(), digest.FromBytes(content).String(), bytes.NewReader(content), hints...)
				if err != nil || got.Word != "stored" {
					t.Errorf("put of %d bytes: %v, %v", len(content), got, err)
				}
			})
		}
	}
	all.Wait()
	checkBatchMemory(t, c)
}
