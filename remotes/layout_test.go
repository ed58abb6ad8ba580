package remotes

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	ondisk "distkit/disk/layout"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// layout writes a directory that has one image per name.
func layout(t *testing.T, dir string, names ...string) ocispec.Descriptor {
	t.Helper()
	write := func(file string, b []byte) {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	blob := func(b []byte) ocispec.Descriptor {
		d := digest.FromBytes(b)
		write(filepath.Join(dir, ondisk.BlobName(d)), b)
		return ocispec.Descriptor{Digest: d, Size: int64(len(b))}
	}
	config := blob([]byte(`{"os":"linux","architecture":"amd64"}`))
	config.MediaType = ocispec.MediaTypeImageConfig
	b, _ := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{}})
	desc := blob(b)
	desc.MediaType = ocispec.MediaTypeImageManifest
	var index ocispec.Index
	for _, name := range names {
		named := desc
		named.Annotations = map[string]string{ocispec.AnnotationRefName: name, "kept": "yes"}
		index.Manifests = append(index.Manifests, named)
	}
	b, _ = json.Marshal(index)
	write(filepath.Join(dir, "index.json"), b)
	write(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`))
	return desc
}

func TestLayout(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "x")
	want := layout(t, dir, "docker.io/library/redis:7", "latest", "docker.io/library/redis:6", "quay.io/x:6")
	// A namespace shares the blobs through a symbolic link.
	ns := filepath.Join(dir, "namespaces", "ns")
	if err := os.MkdirAll(ns, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"oci-layout", "index.json"} {
		b, _ := os.ReadFile(filepath.Join(dir, name))
		os.WriteFile(filepath.Join(ns, name), b, 0o644)
	}
	if err := os.Symlink("../../blobs", filepath.Join(ns, "blobs")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, ns} {
		r, err := Open(path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, object := range []string{"docker.io/library/redis:7", "7", "latest", "6", want.Digest.String()} {
			got, err := r.Resolve(context.Background(), object)
			if err != nil || got.Digest != want.Digest || got.Size != want.Size || got.MediaType != want.MediaType {
				t.Errorf("%s: %+v, %v", object, got, err)
			}
			if _, ok := got.Annotations[ocispec.AnnotationRefName]; ok {
				t.Errorf("%s: the name is not the content's", object)
			}
			b, err := fetch(t, r, object, "offset:1", fmt.Sprintf("size:%d", want.Size))
			if err != nil || int64(len(b)) != want.Size-1 {
				t.Errorf("%s: %q, %v", object, b, err)
			}
		}
		if got, err := ResolvePlatform(context.Background(), r, "7", "linux/amd64"); err != nil || got.Digest != want.Digest {
			t.Error(err)
		}
		_, err = ResolvePlatform(context.Background(), r, "7", "linux/arm64")
		is(t, err, errdefs.IsNotFound)
		for object, class := range map[string]func(error) bool{
			"nope": errdefs.IsNotFound, "edis:7": errdefs.IsNotFound, "": errdefs.IsInvalidArgument, "sha256:abc": errdefs.IsInvalidArgument,
			digest.FromString("nope").String(): errdefs.IsNotFound,
		} {
			_, err := r.Resolve(context.Background(), object)
			is(t, err, class)
			_, err = fetch(t, r, object)
			is(t, err, class)
		}
		_, err = fetch(t, r, "7", "size:1")
		is(t, err, errdefs.IsDataLoss)
	}
}

func TestLayoutAmbiguousTag(t *testing.T) {
	dir := t.TempDir()
	layout(t, dir, "a.example/x:1")
	b, _ := os.ReadFile(filepath.Join(dir, "index.json"))
	var index ocispec.Index
	json.Unmarshal(b, &index)
	other := index.Manifests[0]
	other.Digest, other.Annotations = digest.FromString("other"), map[string]string{ocispec.AnnotationRefName: "b.example/x:1"}
	index.Manifests = append(index.Manifests, other)
	b, _ = json.Marshal(index)
	os.WriteFile(filepath.Join(dir, "index.json"), b, 0o644)
	r, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.Resolve(context.Background(), "1")
	is(t, err, errdefs.IsInvalidArgument)
	if _, err := r.Resolve(context.Background(), "a.example/x:1"); err != nil {
		t.Error(err)
	}
}

func TestLayoutDamaged(t *testing.T) {
	for _, path := range []string{filepath.Join(t.TempDir(), "nope"), t.TempDir()} {
		r, err := Open(path, Options{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = r.Resolve(context.Background(), "1")
		is(t, err, errdefs.IsNotFound)
		_, err = fetch(t, r, digest.FromString("x").String())
		is(t, err, errdefs.IsNotFound)
		is(t, r.Delete(context.Background(), "1"), errdefs.IsNotFound)
	}

	dir := t.TempDir()
	desc := layout(t, dir, "x:1")
	open := func() Remote {
		t.Helper()
		r, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	file := filepath.Join(dir, ondisk.BlobName(desc.Digest))
	b, _ := os.ReadFile(file)
	b[5] ^= 1
	os.WriteFile(file, b, 0o644)
	got, err := fetch(t, open(), "1")
	is(t, err, errdefs.IsDataLoss)
	if len(got) == len(b) {
		t.Error("all bytes of a corrupt blob were given")
	}
	// No file here may make a reader wait without a limit.
	os.Remove(file)
	if err := unix.Mkfifo(file, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = fetch(t, open(), "1")
	is(t, err, errdefs.IsFailedPrecondition)
	os.Remove(file)
	_, err = fetch(t, open(), "1")
	is(t, err, errdefs.IsNotFound)

	os.WriteFile(filepath.Join(dir, "index.json"), []byte("{"), 0o644)
	_, err = open().Resolve(context.Background(), "1")
	is(t, err, errdefs.IsFailedPrecondition)
	os.Truncate(filepath.Join(dir, "index.json"), MaxManifest+1)
	_, err = open().Resolve(context.Background(), "1")
	is(t, err, errdefs.IsFailedPrecondition)
	os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"2.0.0"}`), 0o644)
	_, err = fetch(t, open(), desc.Digest.String())
	is(t, err, errdefs.IsFailedPrecondition)
}

func TestLayoutPut(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	dir := filepath.Join(t.TempDir(), "new", "layout")
	r, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	blob := noise(300000)
	d := digest.FromBytes(blob)
	for range 2 {
		desc, err := r.Push(ctx, d.String(), bytes.NewReader(blob), "size:300000")
		if err != nil || desc.Size != 300000 {
			t.Fatalf("%+v, %v", desc, err)
		}
	}
	if got, err := fetch(t, r, d.String()); err != nil || !bytes.Equal(got, blob) {
		t.Fatal(err)
	}
	_, err = r.Push(ctx, digest.FromString("other").String(), bytes.NewReader(blob))
	is(t, err, errdefs.IsDataLoss)
	_, err = r.Push(ctx, digest.FromBytes(blob[1:]).String(), bytes.NewReader(blob[1:]), "size:5")
	is(t, err, errdefs.IsDataLoss)
	for _, bad := range []string{"", "a b", "sha256:x"} {
		_, err = r.Push(ctx, bad, bytes.NewReader(blob))
		is(t, err, errdefs.IsInvalidArgument)
	}
	_, err = r.Push(ctx, "tag", bytes.NewReader(blob))
	is(t, err, errdefs.IsInvalidArgument)
	files, _ := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	hidden, _ := filepath.Glob(filepath.Join(dir, "blobs/sha256/.*"))
	if len(files) != 1 || len(hidden) != 0 {
		t.Errorf("blobs: %q %q", files, hidden)
	}

	// When many callers set names at the same time, none is lost.
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			m := fmt.Appendf(nil, `{"schemaVersion":2,"layers":[],"config":{"mediaType":"a/b"},"subject":{"digest":%q},"annotations":{"n":"%d"}}`, d, i%10)
			if _, err := r.Push(ctx, fmt.Sprintf("host.example/x:%d", i), bytes.NewReader(m)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	var tags []string
	for tag, err := range r.Tags(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		tags = append(tags, tag)
	}
	if len(tags) != 20 {
		t.Errorf("names: %q", tags)
	}
	n := 0
	for desc, err := range r.Referrers(ctx, d, ReferrerFilter{ArtifactType: "a/b"}) {
		if n++; err != nil || desc.ArtifactType != "a/b" || desc.Annotations["n"] == "" || desc.Annotations[ocispec.AnnotationRefName] != "" {
			t.Errorf("%+v, %v", desc, err)
		}
	}
	if n != 10 {
		t.Errorf("%d referrers", n)
	}
	for range r.Referrers(ctx, d, ReferrerFilter{ArtifactType: "c/d"}) {
		t.Error("a referrer of another type")
	}
	if err := r.Delete(ctx, "host.example/x:1"); err != nil {
		t.Fatal(err)
	}
	is(t, r.Delete(ctx, "host.example/x:1"), errdefs.IsNotFound)
	_, err = r.Resolve(ctx, "host.example/x:1")
	is(t, err, errdefs.IsNotFound)
	desc, err := r.Resolve(ctx, "host.example/x:11")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Delete(ctx, desc.Digest.String()); err != nil {
		t.Fatal(err)
	}
	_, err = r.Resolve(ctx, "host.example/x:11")
	is(t, err, errdefs.IsNotFound)

	// A directory with other content is not used.
	other := t.TempDir()
	os.WriteFile(filepath.Join(other, "thesis"), nil, 0o600)
	if r, err = Open(other, Options{}); err != nil {
		t.Fatal(err)
	}
	_, err = r.Push(ctx, d.String(), bytes.NewReader(blob))
	is(t, err, errdefs.IsFailedPrecondition)
}

// Several callers that put into a directory that does not exist create one layout.
func TestLayoutMadeAtOnce(t *testing.T) {
	t.Parallel()
	for range 20 {
		l := &Layout{dir: filepath.Join(t.TempDir(), "new")}
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				s := fmt.Sprint(i)
				if _, err := l.Push(context.Background(), digest.FromString(s).String(), strings.NewReader(s)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if _, err := l.Resolve(context.Background(), digest.FromString("7").String()); err != nil {
			t.Error(err)
		}
	}
}

// Without a tag, a layout whose only image has no name returns that image. For other layouts the error lists the names.
func TestLayoutOfOneImageWithoutAName(t *testing.T) {
	dir := t.TempDir()
	want := layout(t, dir, "x:1")
	write := func(entries ...string) {
		t.Helper()
		index := `{"schemaVersion":2,"manifests":[` + strings.Join(entries, ",") + `]}`
		if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(index), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	unnamed := fmt.Sprintf(`{"digest":%q,"size":%d}`, want.Digest, want.Size)
	named := strings.Replace(unnamed, "{", `{"annotations":{"org.opencontainers.image.ref.name":"b:1"},`, 1)
	resolve := func(object string) (ocispec.Descriptor, error) {
		t.Helper()
		r, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Resolve(t.Context(), object)
	}
	write(unnamed)
	if got, err := resolve("latest"); err != nil || got.Digest != want.Digest || got.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("%+v, %v", got, err)
	}
	for object, entries := range map[string][]string{"1": {unnamed}, "latest": {unnamed, unnamed}, "latest ": {unnamed}, "x": {named}} {
		write(entries...)
		if got, err := resolve(object); err == nil {
			t.Errorf("%q: %+v", object, got)
		}
	}
	write(named, unnamed)
	if _, err := resolve("latest"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), string(want.Digest)) || !strings.Contains(err.Error(), `"b:1"`) {
		t.Errorf("%v", err)
	}
	write(named)
	if _, err := resolve("latest"); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"b:1"`) {
		t.Errorf("the one has a name: %v", err)
	}
}
