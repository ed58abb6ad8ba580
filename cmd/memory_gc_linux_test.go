package cmd_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// A sweep needs little memory for a hundred thousand blobs, half of them needed and half deleted.
func TestMemoryOfASweep(t *testing.T) {
	const (
		images, layers = 100, 500
		most           = 64 << 20
	)
	root := filepath.Join(t.TempDir(), "store")
	blobs := filepath.Join(root, "blobs", "sha256")
	past := time.Now().Add(-48 * time.Hour)
	blob := func(text string) digest.Digest {
		d := digest.FromString(text)
		name := filepath.Join(blobs, d.Encoded())
		if err := errors.Join(os.WriteFile(name, []byte(text), 0o444), os.Chtimes(name, past, past)); err != nil {
			t.Fatal(err)
		}
		return d
	}
	if err := errors.Join(os.MkdirAll(blobs, 0o755), os.MkdirAll(filepath.Join(root, "ingest"), 0o755),
		os.WriteFile(filepath.Join(root, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)); err != nil {
		t.Fatal(err)
	}
	// Hard links to a few files, which are made quickly. A file can have 65,000.
	link := func(i int) string {
		file, name := filepath.Join(blobs, fmt.Sprint("empty", i>>14)), fmt.Sprintf("%064x", i)
		err := os.Link(file, filepath.Join(blobs, name))
		if errors.Is(err, os.ErrNotExist) {
			err = errors.Join(os.WriteFile(file, []byte("x"), 0o444), os.Chtimes(file, past, past), os.Link(file, filepath.Join(blobs, name)))
		}
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	config := blob("{}")
	var names []string
	for i := range images {
		var all []string
		for l := range layers {
			all = append(all, fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:%s","size":0}`, link(i*layers+l)))
			link(1<<30 + i*layers + l)
		}
		text := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",`+
			`"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":2},"layers":[%s]}`, config, strings.Join(all, ","))
		names = append(names, fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":%d,`+
			`"annotations":{"org.opencontainers.image.ref.name":"x:%d"}}`, blob(text), len(text), i))
	}
	if err := os.WriteFile(filepath.Join(root, "index.json"), []byte(`{"schemaVersion":2,"manifests":[`+strings.Join(names, ",")+`]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(filepath.Join(bin, "dist-gc"), "--root", root, "--grace", "0", "-q")
	var out, stderr bytes.Buffer
	c.Stdout, c.Stderr = &out, &stderr
	peak := bounded(t, c, 5*time.Minute)
	t.Logf("%d MiB", peak>>20)
	if status, n := c.ProcessState.ExitCode(), bytes.Count(out.Bytes(), []byte("\n")); status != 0 || n != images*layers || peak > most {
		t.Errorf("status %d, %d blobs deleted, %d MiB: %s", status, n, peak>>20, &stderr)
	}
}
