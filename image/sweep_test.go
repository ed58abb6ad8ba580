package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/events"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func (f fixture) sweep(before time.Time, dry bool) map[digest.Digest]bool {
	f.t.Helper()
	swept := map[digest.Digest]bool{}
	_, err := Sweep{Store: f.store, Before: before, DryRun: dry}.Run(f.t.Context(), func(info content.Info) error {
		swept[info.Digest] = true
		return nil
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return swept
}

func (f fixture) count() (n int) {
	f.t.Helper()
	if err := f.store.Walk(f.t.Context(), func(content.Info) error { n++; return nil }); err != nil {
		f.t.Fatal(err)
	}
	return n
}

func (f fixture) names(namespace string) *Names {
	f.t.Helper()
	names, err := OpenNames(f.store, namespace)
	if err != nil {
		f.t.Fatal(err)
	}
	return names
}

func (f fixture) name(namespace, name string, d v1.Descriptor) {
	f.t.Helper()
	if _, err := f.names(namespace).Create(f.t.Context(), name, d); err != nil {
		f.t.Fatal(err)
	}
}

func (f fixture) record(ns, id, text string) {
	f.t.Helper()
	dir := filepath.Join(f.store.Root(), "containers", ns, id)
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "container.json"), []byte(text), 0o600)); err != nil {
		f.t.Fatal(err)
	}
}

func (f fixture) container(ns, id string, image digest.Digest) {
	f.t.Helper()
	f.record(ns, id, fmt.Sprintf(`{"id":%q,"image":{"name":"x","digest":%q}}`, id, image))
}

func (f fixture) path(d digest.Digest) string {
	f.t.Helper()
	path, err := f.store.Path(d)
	if err != nil {
		f.t.Fatal(err)
	}
	return path
}

func (f fixture) bytes(d digest.Digest) []byte {
	f.t.Helper()
	b, err := os.ReadFile(f.path(d))
	if err != nil {
		f.t.Fatal(err)
	}
	return b
}

func (f fixture) delete(d digest.Digest) {
	f.t.Helper()
	if err := f.store.Delete(f.t.Context(), d); err != nil {
		f.t.Fatal(err)
	}
}

// link makes a blob quickly. Its content is wrong, but nothing reads it.
func (f fixture) link(i int) {
	f.t.Helper()
	name := fmt.Sprintf("%s/blobs/sha256/%064x", f.store.Root(), i)
	if err := os.WriteFile(name, nil, 0o444); err != nil {
		f.t.Fatal(err)
	}
}

func TestSweepTakesWhatNoNameReaches(t *testing.T) {
	f := newFixture(t)
	ix := f.index(f.image("amd64", 2), f.image("arm64", 1)) // 1 + (1+1+2) + (1+1+1)
	inOther := f.image("s390x", 1)                          // 3
	loose := f.image("riscv64", 1)                          // 3
	blob := f.add("application/octet-stream", []byte("by hand"))
	f.name("default", "a", ix)
	f.name("other", "b", inOther)
	later := time.Now().Add(time.Hour)

	if swept := f.sweep(time.Now().Add(-time.Hour), false); len(swept) != 0 {
		t.Errorf("within the grace: %v", swept)
	}
	if swept := f.sweep(later, true); len(swept) != 4 || !swept[loose.Digest] || !swept[blob.Digest] || f.count() != 15 {
		t.Errorf("dry run: %v; %d blobs are left", swept, f.count())
	}
	if swept := f.sweep(later, false); len(swept) != 4 || f.count() != 11 {
		t.Errorf("sweep: %v; %d blobs are left", swept, f.count())
	}
	for _, d := range []v1.Descriptor{ix, inOther} {
		if missing, err := f.walker("").Missing(t.Context(), d); err != nil || len(missing) != 0 {
			t.Errorf("missing of what has a name: %v, %v", missing, err)
		}
	}
	if err := f.names("default").Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if f.sweep(later, false); f.count() != 3 {
		t.Errorf("%d blobs are left once the name is gone", f.count())
	}
}

// A sweep keeps everything that a document of an unknown type points at, including its subject, and everything that an
// entry without a name points at.
func TestSweepSparesWhatIsInDoubt(t *testing.T) {
	f := newFixture(t)
	layer := f.add(v1.MediaTypeImageLayer, []byte("layer"))
	subject := f.image("amd64", 1)
	strange := f.add("application/vnd.example.thing+json", map[string]any{
		"layers": []v1.Descriptor{layer}, "subject": subject, "manifests": []v1.Descriptor{{Digest: "sha256:../../etc"}},
	})
	f.name("default", "strange", strange)
	f.sweep(time.Now().Add(time.Hour), false)
	if f.count() != 5 {
		t.Errorf("%d blobs are left", f.count())
	}
}

func TestSweepDeletesNothingWhenNamesCannotBeRead(t *testing.T) {
	f := newFixture(t)
	f.name("other", "b", f.image("amd64", 1))
	f.add(v1.MediaTypeImageLayer, []byte("loose"))
	damage(t, f.store.Root()+"/namespaces/other/index.json", "<html>")
	_, err := Sweep{Store: f.store, Before: time.Now().Add(time.Hour)}.Run(t.Context(), func(content.Info) error { return nil })
	if err == nil || f.count() != 4 {
		t.Errorf("%v; %d blobs are left", err, f.count())
	}
}

// A container keeps its image as a name would, and the sweep reports the chain IDs of its layers. A container that
// can't be parsed stops the sweep. One without a record keeps nothing.
func TestSweepSparesWhatContainersPin(t *testing.T) {
	f := newFixture(t)
	pinned, loose := f.image("amd64", 2), f.image("arm64", 1)
	f.record("default", "a", fmt.Sprintf(`{"id":"a","image":{"name":"x","digest":%q},"snapshot":{"driver":"native","key":"k"}}`, pinned.Digest))
	f.record("other", "gone", `{"image":{"digest":"sha256:`+strings.Repeat("0", 64)+`"}}`)
	f.record("other", "empty", "")
	later := time.Now().Add(time.Hour)
	var needed Needed
	s := Sweep{Store: f.store, Before: later, DryRun: true, Snapshots: func(_ context.Context, alone func(func(Needed) error) error) error {
		return alone(func(n Needed) error { needed = n; return nil })
	}}
	if _, err := s.Run(t.Context(), func(content.Info) error { return nil }); err != nil {
		t.Fatal(err)
	}
	layers, err := f.walker("").Layers(t.Context(), pinned)
	if err != nil || len(needed.Chains) != 2 || !needed.Chains.Has(layers[0].ChainID) || !needed.Chains.Has(layers[1].ChainID) {
		t.Errorf("chains %v, layers %v: %v", needed.Chains, layers, err)
	}
	if !needed.Snapshots[Snapshot{"native", "default", "k"}] || needed.Snapshots[Snapshot{"native", "other", "k"}] {
		t.Errorf("snapshots %+v", needed.Snapshots)
	}
	if swept := f.sweep(later, false); len(swept) != 3 || !swept[loose.Digest] {
		t.Errorf("swept %v", swept)
	}
	f.record("other", "torn", `{"image":`)
	if _, err := (Sweep{Store: f.store, Before: later}).Run(t.Context(), func(content.Info) error { return nil }); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("with a torn record: %v", err)
	}
}

// Changes between the moment when names are read and the deletions are respected, of whatever kind.
func TestSweepSeesWhatHappensMeanwhile(t *testing.T) {
	labelled := func(f fixture, d digest.Digest) {
		if _, err := f.store.Update(f.t.Context(), content.Info{Digest: d, Labels: map[string]string{LabelRoot: "now"}}); err != nil {
			f.t.Fatal(err)
		}
	}
	held := func(f fixture, change func()) {
		release, err := layout.Share(f.t.Context(), f.store.Tree)
		if err != nil {
			f.t.Fatal(err)
		}
		change()
		release()
	}
	type change = func(f fixture) (meanwhile func())
	for name, c := range map[string]struct {
		change
		left int
	}{
		"nothing": {func(f fixture) func() {
			f.image("amd64", 1)
			return func() {}
		}, 0},
		"a name is made": {func(f fixture) func() {
			d := f.image("amd64", 1)
			return func() { f.name("default", "a", d) }
		}, 3},
		"a name is made in a new namespace": {func(f fixture) func() {
			d := f.image("amd64", 1)
			return func() { f.name("new", "a", d) }
		}, 3},
		"a name moves": {func(f fixture) func() {
			d, other := f.image("amd64", 1), f.image("arm64", 1)
			f.name("two", "a", d)
			f.name("one", "base", other)
			return func() {
				f.name("one", "a", d)
				if err := f.names("two").Delete(f.t.Context(), "a"); err != nil {
					f.t.Fatal(err)
				}
			}
		}, 6},
		"a name is gone": {func(f fixture) func() {
			f.name("default", "a", f.image("amd64", 1))
			return func() {
				if err := f.names("default").Delete(f.t.Context(), "a"); err != nil {
					f.t.Fatal(err)
				}
			}
		}, 3}, // the next sweep deletes these
		"a container is recorded": {func(f fixture) func() {
			d := f.image("amd64", 1)
			return func() { held(f, func() { f.container("default", "c", d.Digest) }) }
		}, 3},
		"a manifest that was missing comes": {func(f fixture) func() {
			d := f.image("amd64", 1)
			b := f.bytes(d.Digest)
			f.name("default", "a", f.index(d))
			f.delete(d.Digest)
			return func() { held(f, func() { f.add(d.MediaType, b) }) }
		}, 4},
		"a manifest that was missing comes, and its name is made again": {func(f fixture) func() {
			d := f.image("amd64", 1)
			b := f.bytes(d.Digest)
			ix := f.index(d)
			f.name("default", "a", ix)
			f.delete(d.Digest)
			return func() {
				f.add(d.MediaType, b)
				if _, err := f.names("default").Replace(f.t.Context(), "a", ix); err != nil {
					f.t.Fatal(err)
				}
			}
		}, 4},
		"a corrupt manifest is replaced": {func(f fixture) func() {
			d := f.image("amd64", 2)
			b := f.bytes(d.Digest)
			f.name("default", "a", d)
			damage(f.t, f.path(d.Digest), "{")
			return func() { held(f, func() { f.delete(d.Digest); f.add(d.MediaType, b) }) }
		}, 4},
		"a blob is found stored": {func(f fixture) func() {
			d := f.add("", []byte("x"))
			f.add("", []byte("y"))
			return func() { f.add("", []byte("x")); _ = d }
		}, 1},
		"a blob is labelled as a root": {func(f fixture) func() {
			d := f.image("amd64", 1)
			return func() { held(f, func() { labelled(f, d.Digest) }) }
		}, 3},
		"a blob was labelled as a root": {func(f fixture) func() {
			labelled(f, f.image("amd64", 1).Digest)
			f.image("arm64", 1)
			return func() {}
		}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			meanwhile := c.change(f)
			f.add("", []byte("loose"))
			s := Sweep{Store: f.store, Before: time.Now().Add(time.Hour), Snapshots: func(context.Context, func(func(Needed) error) error) error {
				meanwhile()
				return nil
			}}
			if _, err := s.Run(t.Context(), func(content.Info) error { return nil }); err != nil {
				t.Error(err)
			}
			if n := f.count(); n != c.left {
				t.Errorf("%d blobs are left, not %d", n, c.left)
			}
		})
	}
}

// While a sweep reports the blobs that it has deleted, nobody has to wait for it.
func TestSweepKeepsNobodyWaiting(t *testing.T) {
	f := newFixture(t)
	d := f.image("amd64", 1)
	f.name("default", "a", d)
	f.name("other", "a", d)
	for i := range 2 * batch {
		f.link(i)
	}
	reports := 0
	s := Sweep{Store: f.store, Before: time.Now().Add(time.Hour)}
	kept, err := s.Run(t.Context(), func(content.Info) error {
		if reports++; reports%1000 != 1 {
			return nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		release, err := layout.Share(ctx, f.store.Tree)
		if err != nil {
			return err
		}
		release()
		for _, namespace := range []string{"default", "other", fmt.Sprint("new", reports)} {
			if _, err := f.names(namespace).Create(ctx, fmt.Sprint("b", reports), d); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil || reports != 2*batch || kept.Blobs != 3 {
		t.Errorf("%d reports, %+v, %v", reports, kept, err)
	}
	counted := 0
	log, err := events.Open(f.store.Root())
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	err = log.Read(func(e events.Event, _ []byte) error {
		if e.Topic == "/content/delete" {
			t.Errorf("%+v", e)
		}
		if e.Count > phaseBlobs {
			t.Errorf("one phase has deleted %d blobs, and %d are the most", e.Count, phaseBlobs)
		}
		counted += e.Count
		return nil
	})
	if err != nil || counted != 2*batch {
		t.Errorf("%d deletions are logged: %v", counted, err)
	}
}

// During a phase nobody can add a name or take the hold. A caller that waits for that can be cancelled.
func TestPhaseExcludesOthers(t *testing.T) {
	f := newFixture(t)
	d := f.image("amd64", 1)
	f.name("default", "a", d)
	f.name("other", "a", d)
	s := Sweep{Store: f.store, Before: time.Now(), Snapshots: func(ctx context.Context, alone func(func(Needed) error) error) error {
		return alone(func(Needed) error {
			ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			defer cancel()
			for _, namespace := range []string{"default", "other"} {
				if _, err := f.names(namespace).Create(ctx, "b", d); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%s: %v", namespace, err)
				}
			}
			if _, err := layout.Share(ctx, f.store.Tree); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("hold: %v", err)
			}
			return nil
		})
	}}
	if _, err := s.Run(t.Context(), func(content.Info) error { return nil }); err != nil {
		t.Fatal(err)
	}
}

// A corrupt document does not stop a sweep. The blobs that it names are kept, and so are snapshots that its image may
// need.
func TestSweepGoesOnBesideCorruptDocuments(t *testing.T) {
	for _, torn := range []func(b []byte) []byte{
		func(b []byte) []byte { return append(b[:len(b)-1:len(b)-1], 'x') },            // no longer JSON
		func(b []byte) []byte { return bytes.Replace(b, []byte("l"), []byte("L"), 1) }, // still JSON
		func(b []byte) []byte { return append([]byte{0, 0}, b[2:]...) },                // not an object
	} {
		f := newFixture(t)
		d, other := f.image("amd64", 2), f.image("arm64", 1)
		layers, err := f.walker("").Layers(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		f.name("ci", "a:1", f.index(d))
		f.name("ci", "b:1", d)
		loose := f.add("", []byte("loose"))
		config, err := f.walker("").Children(t.Context(), d)
		if err != nil {
			t.Fatal(err)
		}
		for _, dgst := range []digest.Digest{d.Digest, config[0].Digest} {
			damage(t, f.path(dgst), string(torn(f.bytes(dgst))))
		}
		var said []string
		var needed Needed
		s := Sweep{Store: f.store, Before: time.Now().Add(time.Hour), Damaged: func(err error) {
			if !errdefs.IsDataLoss(err) {
				t.Error(err)
			}
			said = append(said, err.Error())
		}, Snapshots: func(_ context.Context, alone func(func(Needed) error) error) error {
			return alone(func(n Needed) error { needed = n; return nil })
		}}
		swept := map[digest.Digest]bool{}
		if _, err := s.Run(t.Context(), func(i content.Info) error { swept[i.Digest] = true; return nil }); err != nil {
			t.Fatal(err)
		}
		if len(swept) != 4 || !swept[loose.Digest] || !swept[other.Digest] || f.count() != 5 {
			t.Errorf("swept %v; %d blobs are left", swept, f.count())
		}
		if len(said) == 0 || !strings.Contains(said[0], string(d.Digest)) || !strings.Contains(said[0], ":1 of namespace ci") {
			t.Errorf("it says %q", said)
		}
		for _, l := range layers {
			if !needed.Chains.Has(l.ChainID) {
				t.Errorf("chain %s is not needed", l.ChainID)
			}
		}
	}
}

// A sweep completes a removal of a namespace that was killed. A blob with a time in the future gets the current time.
func TestSweepOfLeftovers(t *testing.T) {
	f := newFixture(t)
	d := f.image("amd64", 1)
	f.name("gone", "a", d)
	blob := f.add("", []byte("from the future"))
	if at := time.Now().Add(1000 * time.Hour); os.Chtimes(f.path(blob.Digest), at, at) != nil {
		t.Fatal("can't change times")
	}
	dir := filepath.Join(f.store.Root(), "namespaces")
	if err := os.Rename(filepath.Join(dir, "gone"), filepath.Join(dir, ".gone.removed")); err != nil {
		t.Fatal(err)
	}
	var left []string
	s := Sweep{Store: f.store, Before: time.Now().Add(time.Hour), Leftovers: func(l content.Leftover) error { left = append(left, l.Path); return nil }}
	if _, err := s.Run(t.Context(), func(content.Info) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 0 || !slices.Equal(left, []string{"namespaces/.gone.removed"}) {
		t.Errorf("%v, %v; said %q", files, err, left)
	}
	if info, err := f.store.Info(t.Context(), blob.Digest); err != nil || time.Until(info.CreatedAt) > 0 {
		t.Errorf("%+v, %v", info, err)
	}
	if f.sweep(time.Now().Add(time.Hour), false); f.count() != 0 {
		t.Errorf("%d blobs are left", f.count())
	}
}

func TestExplain(t *testing.T) {
	f := newFixture(t)
	a, b := f.image("amd64", 2), f.image("arm64", 1)
	layers, err := f.walker("").Layers(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	ix := f.index(a, b)
	f.name("default", "both:1", ix)
	f.name("ci", "a:1", a)
	f.name("ci", "a:2", a)
	f.container("ci", "c", b.Digest)
	f.record("ci", "snap", fmt.Sprintf(`{"id":"snap","snapshot":{"driver":"native","key":%q}}`, layers[1].ChainID))
	root := f.add("", map[string]any{"policies": []v1.Descriptor{layers[0].Descriptor}})
	if _, err := f.store.Update(t.Context(), content.Info{Digest: root.Digest, Labels: map[string]string{LabelRoot: "x"}}); err != nil {
		t.Fatal(err)
	}
	loose := f.add("", []byte("loose"))
	if err := f.store.Delete(t.Context(), layers[1].Digest); err != nil {
		t.Fatal(err)
	}
	explain := func(before time.Time, d digest.Digest) (all []string, err error) {
		err = Sweep{Store: f.store, Before: before}.Explain(t.Context(), d, func(r Reason) error {
			all = append(all, strings.TrimSpace(fmt.Sprintf("%s %s %s %s", r.Reason, r.Namespace, r.Name, r.Target)))
			return nil
		})
		return all, err
	}
	of := func(kind, namespace, name string, target v1.Descriptor) string {
		return strings.TrimSpace(fmt.Sprintf("%s %s %s %s", kind, namespace, name, target.Digest))
	}
	ofA := []string{of("image", "ci", "a:1", a), of("image", "ci", "a:2", a), of("image", "default", "both:1", ix)}
	later := time.Now().Add(time.Hour)
	for name, c := range map[string]struct {
		digest digest.Digest
		want   []string
	}{
		"a manifest":            {a.Digest, ofA},
		"a layer":               {layers[0].Digest, append(slices.Clone(ofA), of("label", "", "", root))},
		"a layer that is gone":  {layers[1].Digest, ofA},
		"a chain":               {layers[0].ChainID, append(slices.Clone(ofA), of("label", "", "", root))}, // of one layer, so that it is the layer's digest
		"a chain of a snapshot": {layers[1].ChainID, append(slices.Clone(ofA), "container ci snap")},
		"of a container":        {b.Digest, []string{of("image", "default", "both:1", ix), of("container", "ci", "c", b)}},
		"a root":                {root.Digest, []string{of("label", "", "", root)}},
		"loose":                 {loose.Digest, nil},
	} {
		if got, err := explain(later, c.digest); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %v\n%s\nnot\n%s", name, err, strings.Join(got, "\n"), strings.Join(c.want, "\n"))
		}
	}
	if got, err := explain(time.Now().Add(-time.Hour), loose.Digest); err != nil || !slices.Equal(got, []string{"grace"}) {
		t.Errorf("young: %q, %v", got, err)
	}
	release, err := layout.Share(t.Context(), f.store.Tree)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := explain(later, loose.Digest); err != nil || !slices.Equal(got, []string{"hold"}) {
		t.Errorf("held: %q, %v", got, err)
	}
	release()
	if got, err := explain(later, digest.FromString("nothing")); !errdefs.IsNotFound(err) {
		t.Errorf("of nothing: %q, %v", got, err)
	}
	if _, err := explain(later, "x"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("of no digest: %v", err)
	}
}

// Documents of older kinds refer to their blobs, too: the withdrawn artifact manifest by "blobs", docker's schema 1 by
// "fsLayers".
func TestSweepFollowsOlderManifests(t *testing.T) {
	f := newFixture(t)
	blob, layer := f.add("", []byte("an artifact's")), f.add("", []byte("a layer"))
	artifact := f.add("application/vnd.oci.artifact.manifest.v1+json", map[string]any{"mediaType": "application/vnd.oci.artifact.manifest.v1+json", "blobs": []v1.Descriptor{blob}})
	schema1 := f.add("application/vnd.docker.distribution.manifest.v1+prettyjws", map[string]any{
		"schemaVersion": 1, "fsLayers": []map[string]any{{"blobSum": layer.Digest}},
		"mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws",
	})
	f.name("default", "artifact", artifact)
	f.name("default", "schema1", schema1)
	if swept := f.sweep(time.Now().Add(time.Hour), false); len(swept) != 0 || f.count() != 4 {
		t.Errorf("swept %v; %d blobs are left", swept, f.count())
	}
}
