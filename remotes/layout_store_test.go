package remotes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// A put into a store follows distkit-layout(5), like the store's own commands.
func TestLayoutPutFollowsThePage(t *testing.T) {
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "new", "store")
	old := unix.Umask(0o077)
	r, err := Open(dir, Options{})
	if err == nil {
		_, err = r.Push(ctx, digest.FromString("blob").String(), strings.NewReader("blob"))
	}
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"": 0o700, "../../new": 0o700, "blobs/sha256": 0o700, "index.json": 0o600, "oci-layout": 0o600} {
		if fi, err := os.Stat(filepath.Join(dir, name)); err != nil || fi.Mode().Perm() != mode {
			t.Errorf("%s with umask 077: %v, %v", name, fi.Mode(), err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "ingest"), 0o755); err != nil { // as stores have it
		t.Fatal(err)
	}

	// A blob that exists gets the current time, so that a sweep at the same time keeps it.
	file := filepath.Join(dir, "blobs", "sha256", digest.FromString("blob").Encoded())
	past := time.Now().Add(-48 * time.Hour)
	if err := os.Chtimes(file, past, past); err != nil {
		t.Fatal(err)
	}
	if pushed, err := r.Push(ctx, digest.FromString("blob").String(), strings.NewReader("blob")); err != nil || pushed.State != Exists {
		t.Errorf("%+v, %v", pushed, err)
	}
	if fi, err := os.Stat(file); err != nil || time.Since(fi.ModTime()) > time.Hour {
		t.Errorf("found there, and from %v: %v", fi.ModTime(), err)
	}

	// Entries that a change does not concern are written back unchanged.
	entry := `{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:` + strings.Repeat("1", 64) + `","size":1,"x-entry":{"deep":[1.50]},"annotations":{"a":"b"}}`
	named := strings.Replace(entry, `"a":"b"`, `"org.opencontainers.image.ref.name":"x:1","team":"core","distkit.created":"2020-01-01T00:00:00Z"`, 1)
	index := `{"schemaVersion":2,"x-top":[1.50],"manifests":[` + entry + `,` + named + `]}`
	if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(index), 0o644); err != nil {
		t.Fatal(err)
	}
	manifest := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"a/b","digest":"` +
		digest.FromString("blob").String() + `","size":4},"layers":[]}`
	if _, err := r.Push(ctx, "x:1", strings.NewReader(manifest)); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil || !bytes.Contains(b, []byte(entry)) || !bytes.Contains(b, []byte(`"x-top":[1.50]`)) {
		t.Errorf("%s, %v", b, err)
	}
	var got struct {
		Manifests []struct {
			Digest      digest.Digest
			Annotations map[string]string
		}
	}
	if err := json.Unmarshal(b, &got); err != nil || len(got.Manifests) != 2 {
		t.Fatalf("%s, %v", b, err)
	}
	if m := got.Manifests[1]; m.Digest != digest.FromString(manifest) || m.Annotations["team"] != "core" || m.Annotations["distkit.created"] != "2020-01-01T00:00:00Z" ||
		m.Annotations["distkit.updated"] == "" {
		t.Errorf("%+v", m)
	}
	if err := r.Delete(ctx, "x:1"); err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(filepath.Join(dir, "events"))
	for _, topic := range []string{"/content/create", "/images/update", "/images/delete"} {
		if err != nil || !bytes.Contains(log, []byte(topic)) {
			t.Errorf("no %s in the log: %s, %v", topic, log, err)
		}
	}
}

// As many names as dist-image allows can be written here, too.
func TestLayoutOfManyNames(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	desc := layout(t, dir, "first:1")
	var all strings.Builder
	const names = 40_000
	for i := range names {
		fmt.Fprintf(&all, `,{"mediaType":%q,"digest":%q,"size":%d,"annotations":{"org.opencontainers.image.ref.name":"example.org/%s:%d"}}`,
			desc.MediaType, desc.Digest, desc.Size, strings.Repeat("x", 100), i)
	}
	if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(`{"schemaVersion":2,"manifests":[`+all.String()[1:]+`]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	r, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, err := range r.Tags(context.Background()) {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n != names {
		t.Errorf("%d names", n)
	}
	if err := r.Delete(context.Background(), fmt.Sprintf("example.org/%s:7", strings.Repeat("x", 100))); err != nil {
		t.Error(err)
	}
}

// A layout may come from a stranger. No file in it leads outside, or makes a reader wait.
func TestLayoutFollowsNoLink(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for _, name := range []string{"index.json", "oci-layout", "blobs", "blobs/sha256"} {
		for what, make := range map[string]func(path, away string) error{
			"a link":           func(path, away string) error { return os.Symlink(away, path) },
			"a link to /":      func(path, _ string) error { return os.Symlink("/", path) },
			"a link to itself": func(path, _ string) error { return os.Symlink(filepath.Base(path), path) },
			"a FIFO":           func(path, _ string) error { return unix.Mkfifo(path, 0o644) },
		} {
			dir := filepath.Join(t.TempDir(), "layout")
			layout(t, dir, "x:1")
			away := filepath.Join(t.TempDir(), "away")
			if err := errors.Join(os.Rename(filepath.Join(dir, name), away), make(filepath.Join(dir, name), away)); err != nil {
				t.Fatal(err)
			}
			before := files(t, away)
			r, err := Open(dir, Options{})
			if err != nil {
				t.Fatal(err)
			}
			_, err = r.Resolve(ctx, "x:1")
			_, ferr := fetch(t, r, "x:1")
			_, perr := r.Push(ctx, digest.FromString("new").String(), strings.NewReader("new"))
			_, nerr := r.Push(ctx, "new:1", strings.NewReader(`{"schemaVersion":2,"layers":[],"config":{"mediaType":"a/b"}}`))
			derr := r.Delete(ctx, "x:1")
			for call, err := range map[string]error{"resolve": err, "fetch": ferr, "push": perr, "push by name": nerr, "delete": derr} {
				// A call that does not need the file may succeed.
				needed := name == "oci-layout" || name == "index.json" && call != "push" || name != "index.json" && call != "delete" && call != "resolve"
				if needed && !errdefs.IsFailedPrecondition(err) {
					t.Errorf("%s is %s: %s: %v", name, what, call, err)
				}
			}
			if after := files(t, away); after != before {
				t.Errorf("%s is %s: outside was %s, is %s", name, what, before, after)
			}
		}
	}
}

func files(t *testing.T, dir string) string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		all = append(all, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, " ")
}
