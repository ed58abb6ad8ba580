package copygraph_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"distkit/content"
	"distkit/errclass"
	"distkit/image"
	"distkit/image/copygraph"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func open(t *testing.T) *content.Store {
	t.Helper()
	s, err := content.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, s *content.Store, mediaType string, b []byte) v1.Descriptor {
	t.Helper()
	d, err := content.WriteBlob(t.Context(), s, "fixture", bytes.NewReader(b), 0, "")
	if err != nil {
		t.Fatal(err)
	}
	return v1.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
}

func putJSON(t *testing.T, s *content.Store, mediaType string, v any) v1.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return put(t, s, mediaType, b)
}

// manifest stores an image with one layer for each text, and returns its manifest.
func manifest(t *testing.T, s *content.Store, arch string, layers ...string) v1.Descriptor {
	t.Helper()
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Layers: []v1.Descriptor{}}
	m.SchemaVersion = 2
	m.Config = putJSON(t, s, v1.MediaTypeImageConfig, map[string]any{"os": "linux", "architecture": arch})
	for _, text := range layers {
		m.Layers = append(m.Layers, put(t, s, v1.MediaTypeImageLayer, []byte(text)))
	}
	return putJSON(t, s, v1.MediaTypeImageManifest, m)
}

func index(t *testing.T, s *content.Store, manifests ...v1.Descriptor) v1.Descriptor {
	t.Helper()
	i := v1.Index{MediaType: v1.MediaTypeImageIndex, Manifests: manifests}
	i.SchemaVersion = 2
	return putJSON(t, s, v1.MediaTypeImageIndex, i)
}

func on(d v1.Descriptor, arch string) v1.Descriptor {
	d.Platform = &v1.Platform{OS: "linux", Architecture: arch}
	return d
}

// records runs a copy and returns the state of each object. The test fails if one is reported twice.
func records(t *testing.T, c *copygraph.Copy, roots ...v1.Descriptor) (map[digest.Digest]copygraph.Outcome, error) {
	t.Helper()
	got := map[digest.Digest]copygraph.Outcome{}
	c.Jobs = 4
	c.Record = func(d v1.Descriptor, o copygraph.Outcome) error {
		if _, ok := got[d.Digest]; ok {
			t.Errorf("%s is recorded twice", d.Digest)
		}
		got[d.Digest] = o
		return nil
	}
	err := c.Run(t.Context(), roots...)
	return got, err
}

func whole(t *testing.T, s *content.Store, root v1.Descriptor) {
	t.Helper()
	missing, err := image.Walker{Store: s}.Missing(t.Context(), root)
	if err != nil || len(missing) > 0 {
		t.Errorf("%d objects are missing, %v", len(missing), err)
	}
}

func count(got map[digest.Digest]copygraph.Outcome, want copygraph.Outcome) (n int) {
	for _, o := range got {
		if o == want {
			n++
		}
	}
	return n
}

func TestStoreToStore(t *testing.T) {
	t.Parallel()
	from, to := open(t), open(t)
	shared := strings.Repeat("shared", 1000)
	amd := on(manifest(t, from, "amd64", shared, "a"), "amd64")
	root := index(t, from, amd, on(manifest(t, from, "arm64", shared, "b"), "arm64"), amd)
	c := func() *copygraph.Copy {
		return &copygraph.Copy{Documents: to, From: copygraph.FromStore(from), To: copygraph.IntoStore(to)}
	}
	got, err := records(t, c(), root)
	if err != nil || len(got) != 8 || count(got, copygraph.Stored) != 8 {
		t.Errorf("%v, %v", got, err)
	}
	whole(t, to, root)
	got, err = records(t, c(), root)
	if err != nil || len(got) != 8 || count(got, copygraph.Exists) != 8 {
		t.Errorf("again: %v, %v", got, err)
	}
	// The manifest is addressed only by its digest.
	to = open(t)
	one := c()
	one.Record = func(d v1.Descriptor, _ copygraph.Outcome) error {
		if d.Digest == root.Digest && (d.Size != root.Size || d.MediaType != root.MediaType) {
			t.Errorf("the root is recorded as %v", d)
		}
		return nil
	}
	if err := one.Run(t.Context(), v1.Descriptor{Digest: root.Digest, Size: -1}); err != nil || one.Totals() != (copygraph.Totals{Objects: 8, Landed: 8, Bytes: one.Totals().Bytes, LandedBytes: one.Totals().Bytes}) {
		t.Errorf("%+v, %v", one.Totals(), err)
	}
	whole(t, to, root)
	wrong := root
	wrong.Size--
	if _, err := records(t, c(), wrong); !errdefs.IsDataLoss(err) {
		t.Errorf("a wrong size: %v", err)
	}
}

func TestPlatforms(t *testing.T) {
	t.Parallel()
	from := open(t)
	amd, arm := manifest(t, from, "amd64", "a"), manifest(t, from, "arm64", "b")
	root := index(t, from, on(amd, "amd64"), on(arm, "arm64"), on(manifest(t, from, "s390x", "c"), "s390x"))
	platform := func(s string) *image.Platform {
		p, err := image.ParsePlatform(s)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for _, c := range []struct {
		root      v1.Descriptor
		platforms []string
		want      int
		failed    func(error) bool
	}{
		{root, []string{"linux/amd64"}, 4, nil},
		{root, []string{"linux/amd64", "linux/arm64"}, 7, nil},
		{root, []string{"linux/amd64", "linux/amd64"}, 4, nil},
		{root, []string{"linux/riscv64"}, 0, errdefs.IsNotFound},
		{amd, []string{"linux/amd64"}, 3, nil},
		{amd, []string{"linux/arm64"}, 0, errdefs.IsNotFound}, // only its config has the platform
	} {
		to := open(t)
		g := &copygraph.Copy{Documents: to, From: copygraph.FromStore(from), To: copygraph.IntoStore(to)}
		for _, s := range c.platforms {
			g.Platforms = append(g.Platforms, platform(s))
		}
		got, err := records(t, g, c.root)
		if c.failed != nil {
			if !c.failed(err) {
				t.Errorf("%v: %v", c.platforms, err)
			}
			continue
		}
		if err != nil || len(got) != c.want || count(got, copygraph.Stored) != c.want {
			t.Errorf("%v: %v, %v", c.platforms, got, err)
		}
	}
}

func TestForeignLayersAreLeftOut(t *testing.T) {
	t.Parallel()
	from, to := open(t), open(t)
	layer := put(t, from, "application/vnd.oci.image.layer.nondistributable.v1.tar", []byte("foreign"))
	both := put(t, from, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", []byte("both"))
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: put(t, from, v1.MediaTypeImageConfig, []byte("{}")), Layers: []v1.Descriptor{layer, both}}
	a := putJSON(t, from, v1.MediaTypeImageManifest, m)
	other := both
	other.MediaType = v1.MediaTypeImageLayerGzip
	m.Layers = []v1.Descriptor{other}
	b := putJSON(t, from, v1.MediaTypeImageManifest, m)
	got, err := records(t, &copygraph.Copy{Documents: to, From: copygraph.FromStore(from), To: copygraph.IntoStore(to)}, a, b)
	if err != nil || len(got) != 5 || got[layer.Digest] != copygraph.Foreign || got[both.Digest] != copygraph.Stored {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := to.Info(t.Context(), layer.Digest); !errdefs.IsNotFound(err) {
		t.Errorf("a foreign layer was copied: %v", err)
	}
}

// remote is a target that keeps objects in memory.
type remote struct {
	t       *testing.T
	mu      sync.Mutex
	blobs   map[digest.Digest][]byte
	tags    map[string]digest.Digest
	asked   int // the number of calls of Has
	puts    []digest.Digest
	mounted []digest.Digest
	fail    func(copygraph.Object) error
}

func newRemote(t *testing.T) *remote {
	return &remote{t: t, blobs: map[digest.Digest][]byte{}, tags: map[string]digest.Digest{}}
}

func (r *remote) Has(_ context.Context, objects []copygraph.Object) ([]bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked++
	has := make([]bool, len(objects))
	for i, o := range objects {
		_, has[i] = r.blobs[o.Digest]
		if o.Tag != "" {
			has[i] = r.tags[o.Tag] == o.Digest
		}
	}
	return has, nil
}

func (r *remote) Mount(_ context.Context, d v1.Descriptor, repository string) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if repository != "from/here" {
		return false, nil
	}
	r.mounted = append(r.mounted, d.Digest)
	r.blobs[d.Digest] = nil
	return true, nil
}

func (r *remote) Put(_ context.Context, o copygraph.Object, in io.ReadSeeker) (copygraph.Outcome, error) {
	b, err := io.ReadAll(in)
	if err != nil {
		return "", err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		if err := r.fail(o); err != nil {
			return "", err
		}
	}
	if digest.FromBytes(b) != o.Digest {
		return "", errclass.Errorf(errdefs.ErrDataLoss, "digest mismatch")
	}
	// The objects that the manifest refers to have been stored before.
	var doc struct {
		Config            *v1.Descriptor
		Layers, Manifests []v1.Descriptor
	}
	if image.IsIndex(o.MediaType) || image.IsManifest(o.MediaType) {
		if err := json.Unmarshal(b, &doc); err != nil {
			return "", err
		}
		if doc.Config != nil {
			doc.Layers = append(doc.Layers, *doc.Config)
		}
		for _, d := range slices.Concat(doc.Layers, doc.Manifests) {
			if _, ok := r.blobs[d.Digest]; !ok && !strings.Contains(d.MediaType, "foreign") {
				r.t.Errorf("%s comes before %s", o.Digest, d.Digest)
			}
		}
	}
	r.blobs[o.Digest] = b
	if o.Tag != "" {
		r.tags[o.Tag] = o.Digest
	}
	r.puts = append(r.puts, o.Digest)
	return copygraph.Stored, nil
}

// nested is an index that lists a manifest both before and after an index which also lists that manifest.
func nested(t *testing.T, s *content.Store) v1.Descriptor {
	m := on(manifest(t, s, "amd64", "a", "b"), "amd64")
	inner := index(t, s, m, on(manifest(t, s, "arm64", "a"), "arm64"))
	return index(t, s, m, inner, index(t, s, inner))
}

func TestToARemoteChildrenComeFirst(t *testing.T) {
	t.Parallel()
	from, to := open(t), newRemote(t)
	root := nested(t, from)
	foreign := putJSON(t, from, v1.MediaTypeImageManifest, v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: put(t, from, v1.MediaTypeImageConfig, []byte("{}")),
		Layers: []v1.Descriptor{{MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Digest: digest.FromString("elsewhere"), Size: 9}}})
	root = index(t, from, root, foreign)
	got, err := records(t, &copygraph.Copy{Documents: from, To: to, Tags: []string{"one", "two"}}, root)
	if err != nil || len(got) != 13 || count(got, copygraph.Stored) != 12 || count(got, copygraph.Foreign) != 1 {
		t.Errorf("%v, %v", got, err)
	}
	if to.asked != 1 || to.tags["one"] != root.Digest || to.tags["two"] != root.Digest || len(to.puts) != 13 {
		t.Errorf("asked %d times; tags %v; %d puts", to.asked, to.tags, len(to.puts))
	}
	to.puts = nil
	if got, err := records(t, &copygraph.Copy{Documents: from, To: to, Tags: []string{"one", "two"}}, root); err != nil || len(to.puts) != 0 || count(got, copygraph.Exists) != 12 {
		t.Errorf("again: %v, %v", got, err)
	}
	if _, err := records(t, &copygraph.Copy{Documents: from, To: to, Tags: []string{"three"}}, root); err != nil || len(to.puts) != 1 || to.tags["three"] != root.Digest {
		t.Errorf("a new tag alone: %d puts, %v", len(to.puts), err)
	}
	if _, err := records(t, &copygraph.Copy{Documents: from, To: to, Tags: []string{"x"}}, root, foreign); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a tag for two roots: %v", err)
	}
}

func TestFromRemoteToRemote(t *testing.T) {
	t.Parallel()
	from, scratch, to := open(t), open(t), newRemote(t)
	root := nested(t, from)
	got, err := records(t, &copygraph.Copy{Documents: scratch, From: copygraph.FromStore(from), To: to}, root)
	if err != nil || count(got, copygraph.Stored) != 9 || len(got) != 9 {
		t.Errorf("%d objects: %v, %v", len(got), got, err)
	}
	n := 0
	if err := scratch.Digests(t.Context(), func(digest.Digest) error { n++; return nil }); err != nil || n != 5 {
		t.Errorf("%d documents were kept, %v", n, err)
	}
}

func TestMounts(t *testing.T) {
	t.Parallel()
	from, to := open(t), newRemote(t)
	root := manifest(t, from, "amd64", "a", "b", "c")
	got, err := records(t, &copygraph.Copy{Documents: from, To: to, Mount: func(d digest.Digest) string {
		switch d {
		case digest.FromString("a"), root.Digest:
			return "from/here"
		case digest.FromString("b"):
			return "gone"
		}
		return ""
	}}, root)
	if err != nil || got[digest.FromString("a")] != copygraph.Mounted || got[digest.FromString("b")] != copygraph.Stored || got[root.Digest] != copygraph.Stored || len(to.mounted) != 1 {
		t.Errorf("%v, %v", got, err)
	}
}

func TestWhatIsMissing(t *testing.T) {
	t.Parallel()
	from, to := open(t), newRemote(t)
	m := manifest(t, from, "amd64", "a", "b")
	if err := from.Delete(t.Context(), digest.FromString("b")); err != nil {
		t.Fatal(err)
	}
	_, err := records(t, &copygraph.Copy{Documents: from, To: to}, m)
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), string(digest.FromString("b"))) {
		t.Errorf("%v", err)
	}
	if _, ok := to.blobs[m.Digest]; ok {
		t.Error("a manifest was put without one of its layers")
	}
	to.blobs[digest.FromString("b")] = nil // the target has it
	if _, err := records(t, &copygraph.Copy{Documents: from, To: to}, m); err != nil {
		t.Error(err)
	}
	store := open(t)
	if _, err := records(t, &copygraph.Copy{Documents: store, From: copygraph.FromStore(from), To: copygraph.IntoStore(store)}, v1.Descriptor{Digest: digest.FromString("none"), Size: -1}); !errdefs.IsNotFound(err) {
		t.Errorf("no root: %v", err)
	}
}

func TestDryRunAndBound(t *testing.T) {
	t.Parallel()
	from, to, scratch := open(t), open(t), open(t)
	root := manifest(t, from, "amd64", "a", "b")
	put(t, to, "", []byte("b"))
	g := func() *copygraph.Copy {
		return &copygraph.Copy{Documents: scratch, From: copygraph.Either{copygraph.FromStore(to), copygraph.FromStore(from)}, To: copygraph.IntoStore(to), DryRun: true}
	}
	got, err := records(t, g(), root)
	if err != nil || count(got, copygraph.Missing) != 3 || got[digest.FromString("b")] != copygraph.Exists {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := to.Info(t.Context(), root.Digest); !errdefs.IsNotFound(err) {
		t.Errorf("a dry run stored something: %v", err)
	}
	c := g()
	c.MaxBytes = 10
	if _, err := records(t, c, root); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("more than the bound: %v", err)
	}
}

// flaky is a source whose connections break.
type flaky struct {
	copygraph.Source
	mu      sync.Mutex
	opened  map[digest.Digest][]int64 // the offsets at which each blob was opened
	cut     func(d digest.Digest, attempt int) (after int64, cut bool)
	failure error
}

func (f *flaky) Open(ctx context.Context, d v1.Descriptor, offset int64, asked func()) (io.ReadCloser, error) {
	f.mu.Lock()
	f.opened[d.Digest] = append(f.opened[d.Digest], offset)
	after, cut := f.cut(d.Digest, len(f.opened[d.Digest]))
	f.mu.Unlock()
	r, err := f.Source.Open(ctx, d, offset, asked)
	if err != nil || !cut {
		return r, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.MultiReader(io.LimitReader(r, after), failing{f.failure}), r}, nil
}

type failing struct{ error }

func (f failing) Read([]byte) (int, error) { return 0, f.error }

func TestACutSourceIsResumed(t *testing.T) {
	t.Parallel()
	from, to := open(t), open(t)
	big := strings.Repeat("0123456789abcdef", 4096)
	root := manifest(t, from, "amd64", big)
	layer := digest.FromString(big)
	source := &flaky{Source: copygraph.FromStore(from), opened: map[digest.Digest][]int64{}, failure: errclass.Errorf(errdefs.ErrAborted, "cut"),
		cut: func(d digest.Digest, attempt int) (int64, bool) { return 20_000, d == layer && attempt < 3 }}
	if _, err := records(t, &copygraph.Copy{Documents: to, From: source, To: copygraph.IntoStore(to)}, root); err != nil {
		t.Fatal(err)
	}
	whole(t, to, root)
	if got := source.opened[layer]; !slices.Equal(got, []int64{0, 20_000, 40_000}) {
		t.Errorf("opened at %v", got)
	}

	// If a connection brings nothing, the copy stops trying, and the bytes that came before are kept.
	to = open(t)
	source.opened = map[digest.Digest][]int64{}
	source.cut = func(d digest.Digest, attempt int) (int64, bool) {
		if attempt > 1 {
			return 0, d == layer
		}
		return 20_000, d == layer
	}
	_, err := records(t, &copygraph.Copy{Documents: to, From: source, To: copygraph.IntoStore(to)}, root)
	if !errdefs.IsAborted(err) || len(source.opened[layer]) != 4 || to.Offset(layer) != 20_000 {
		t.Errorf("%v; opened at %v; %d bytes are kept", err, source.opened[layer], to.Offset(layer))
	}
	source.opened = map[digest.Digest][]int64{}
	source.cut = func(digest.Digest, int) (int64, bool) { return 0, false }
	if _, err := records(t, &copygraph.Copy{Documents: to, From: source, To: copygraph.IntoStore(to)}, root); err != nil || !slices.Equal(source.opened[layer], []int64{20_000}) {
		t.Errorf("%v; opened at %v", err, source.opened[layer])
	}
	whole(t, to, root)

	// Another failure is not a reason to try again.
	to = open(t)
	source.opened, source.failure = map[digest.Digest][]int64{}, errclass.Errorf(errdefs.ErrUnauthenticated, "who are you")
	source.cut = func(d digest.Digest, _ int) (int64, bool) { return 0, d == layer }
	if _, err := records(t, &copygraph.Copy{Documents: to, From: source, To: copygraph.IntoStore(to)}, root); !errdefs.IsUnauthorized(err) || len(source.opened[layer]) != 1 {
		t.Errorf("%v; opened at %v", err, source.opened[layer])
	}
}

// A source may send anything.
func TestAHostileSource(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := manifest(t, from, "amd64", "layer")
	layer := digest.FromString("layer")
	for what, content := range map[string]string{"another": "reyal", "more": "layer and more", "less": "lay", "nothing": ""} {
		to := open(t)
		source := sourceFunc(func(ctx context.Context, d v1.Descriptor, offset int64) (io.ReadCloser, error) {
			if d.Digest == layer {
				return io.NopCloser(strings.NewReader(content)), nil
			}
			return copygraph.FromStore(from).Open(ctx, d, offset, nil)
		})
		_, err := records(t, &copygraph.Copy{Documents: to, From: source, To: copygraph.IntoStore(to)}, root)
		if !errdefs.IsDataLoss(err) && !errdefs.IsAborted(err) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := to.Info(t.Context(), layer); !errdefs.IsNotFound(err) {
			t.Errorf("%s was stored: %v", what, err)
		}
	}
	// Documents without an end are refused, even if their size is not known.
	for _, size := range []int64{-1, image.MaxDocument + 1} {
		to := open(t)
		endless := sourceFunc(func(context.Context, v1.Descriptor, int64) (io.ReadCloser, error) { return io.NopCloser(zeros{}), nil })
		_, err := records(t, &copygraph.Copy{Documents: to, From: endless, To: copygraph.IntoStore(to)}, v1.Descriptor{MediaType: v1.MediaTypeImageIndex, Digest: digest.FromString("x"), Size: size})
		if !errdefs.IsDataLoss(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("of size %d: %v", size, err)
		}
	}
	// An index whose documents exceed the limit for an image is refused before they are read.
	to := open(t)
	var many []v1.Descriptor
	for i := range 40 {
		many = append(many, v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString(fmt.Sprint(i)), Size: image.MaxDocument})
	}
	wide := index(t, from, many...)
	opened := 0
	source := sourceFunc(func(ctx context.Context, d v1.Descriptor, offset int64) (io.ReadCloser, error) {
		opened++
		return copygraph.FromStore(from).Open(ctx, d, offset, nil)
	})
	if _, err := records(t, &copygraph.Copy{Documents: to, From: source, To: copygraph.IntoStore(to)}, wide); !errdefs.IsInvalidArgument(err) || opened != 1 {
		t.Errorf("%v; %d objects were opened", err, opened)
	}
}

type sourceFunc func(context.Context, v1.Descriptor, int64) (io.ReadCloser, error)

func (f sourceFunc) Open(ctx context.Context, d v1.Descriptor, offset int64, _ func()) (io.ReadCloser, error) {
	return f(ctx, d, offset)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestATargetThatFailsForTheTimeBeing(t *testing.T) {
	t.Parallel()
	from, to := open(t), newRemote(t)
	root := manifest(t, from, "amd64", "a")
	failed := 0
	to.fail = func(o copygraph.Object) error {
		if o.Digest == digest.FromString("a") && failed < 2 {
			failed++
			return errclass.Errorf(errdefs.ErrResourceExhausted, "slow down")
		}
		return nil
	}
	if _, err := records(t, &copygraph.Copy{Documents: from, To: to}, root); err != nil || failed != 2 {
		t.Errorf("%v after %d failures", err, failed)
	}
	failed, to = -100, newRemote(t)
	to.fail = func(copygraph.Object) error { failed++; return errclass.Errorf(errdefs.ErrAborted, "gone") }
	if _, err := records(t, &copygraph.Copy{Documents: from, To: to}, root); !errdefs.IsAborted(err) {
		t.Errorf("%v", err)
	}
	if len(to.blobs) > 0 || failed > -90 {
		t.Errorf("%d attempts", failed+100)
	}
}

// boastful is a target that each time states that it has more of a layer, and accepts no bytes of it.
type boastful struct {
	*remote
	part, puts int64
}

func (b *boastful) Part(_ context.Context, o copygraph.Object) (int64, error) {
	if o.Size < 100_000 {
		return 0, nil
	}
	b.part += 5000
	return b.part, nil
}

func (b *boastful) Put(ctx context.Context, o copygraph.Object, in io.ReadSeeker) (copygraph.Outcome, error) {
	if o.Size < 100_000 {
		return b.remote.Put(ctx, o, in)
	}
	b.puts++
	return "", errclass.Errorf(errdefs.ErrAborted, "not now")
}

func TestAPartThatATargetOnlySaysItHasIsNoProgress(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := manifest(t, from, "amd64", strings.Repeat("layer", 30_000))
	to := &boastful{remote: newRemote(t)}
	_, err := records(t, &copygraph.Copy{Documents: from, To: to}, root)
	if !errdefs.IsAborted(err) || to.puts != 4 {
		t.Errorf("%d attempts, %v", to.puts, err)
	}
}

func TestTheFirstFailureCounts(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := manifest(t, from, "amd64", "a", "b", "c")
	first := errors.New("first")
	to := open(t)
	c := &copygraph.Copy{Documents: to, To: copygraph.IntoStore(to), Jobs: 4, From: sourceFunc(func(ctx context.Context, d v1.Descriptor, offset int64) (io.ReadCloser, error) {
		switch d.Digest {
		case digest.FromString("b"):
			return nil, first
		case digest.FromString("c"):
			<-ctx.Done() // the failure of the other stops this one
			return nil, ctx.Err()
		}
		return copygraph.FromStore(from).Open(ctx, d, offset, nil)
	})}
	if err := c.Run(t.Context(), root); !errors.Is(err, first) {
		t.Error(err)
	}
	if list, err := to.ListStatuses(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("ingests without a byte are left: %v, %v", list, err)
	}
}
