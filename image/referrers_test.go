package image

import (
	"context"
	"strconv"
	"testing"
	"time"

	"distkit/disk"
	"distkit/disk/layout"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// attach stores a referrer, which has three blobs, and lists it in a namespace.
func (f fixture) attach(namespace string, subject v1.Descriptor, text string) v1.Descriptor {
	f.t.Helper()
	layer := f.add("text/plain", []byte(text))
	config := f.add(v1.MediaTypeEmptyJSON, []byte(text+" config"))
	d := f.add(v1.MediaTypeImageManifest, v1.Manifest{MediaType: v1.MediaTypeImageManifest, ArtifactType: "a/b", Config: config, Layers: []v1.Descriptor{layer}, Subject: &subject})
	f.refer(namespace, layout.Referrer{Descriptor: d, Subject: subject.Digest})
	return d
}

func (f fixture) refer(namespace string, r layout.Referrer) {
	f.t.Helper()
	if err := f.names(namespace).AddReferrers(f.t.Context(), []layout.Referrer{r}); err != nil {
		f.t.Fatal(err)
	}
}

// unnamed counts the entries without a name.
func (f fixture) unnamed(namespace string) int {
	f.t.Helper()
	l, err := f.names(namespace).Read()
	if err != nil {
		f.t.Fatal(err)
	}
	return len(l.Unnamed())
}

// Referrers stay as long as anything else needs their subject, and are deleted with it.
func TestSweepTakesReferrersWithTheirSubject(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	child, alone := f.image("amd64", 1), f.image("riscv64", 1) // 3 + 3
	ix := f.index(child)                                       // 1
	signature := f.attach("default", child, "signature")       // 3
	f.attach("default", signature, "signature of the signature")
	tagged := f.image("s390x", 1) // 3
	f.refer("default", layout.Referrer{Descriptor: tagged, Subject: ix.Digest, Tag: "sha256-x.sig"})
	f.attach("default", alone, "of what has no name")
	// Another namespace needs the index, and lists its own referrer. A referrer that has a name keeps its subject.
	f.attach("other", ix, "of the other namespace")
	f.name("other", "a", ix)
	named := f.attach("default", f.image("arm64", 1), "named")
	f.name("default", "named", named)

	later := time.Now().Add(time.Hour)
	if swept := f.sweep(time.Now().Add(-time.Hour), false); len(swept) != 0 || f.unnamed("default") != 5 {
		t.Errorf("within the grace: %v, %d entries", swept, f.unnamed("default"))
	}
	if swept := f.sweep(later, true); len(swept) != 6 || !swept[alone.Digest] || f.unnamed("default") != 5 {
		t.Errorf("dry run: %v, %d entries", swept, f.unnamed("default"))
	}
	all := f.count()
	if swept := f.sweep(later, false); len(swept) != 6 || f.count() != all-6 || f.unnamed("default") != 4 || f.unnamed("other") != 1 {
		t.Errorf("%v; %d entries, %d", swept, f.unnamed("default"), f.unnamed("other"))
	}
	usage, err := f.names("other").Usage(t.Context())
	if err != nil || len(usage) != 1 || usage[0].Exclusive != usage[0].Size {
		t.Errorf("%+v, %v", usage, err)
	}
	var reasons []Reason
	err = Sweep{Store: f.store, Before: later}.Explain(t.Context(), signature.Digest, func(r Reason) error { reasons = append(reasons, r); return nil })
	if err != nil || len(reasons) != 1 || reasons[0].Namespace != "other" || reasons[0].Name != "a" {
		t.Errorf("%+v, %v", reasons, err)
	}
	if err := f.names("other").Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if f.sweep(later, false); f.count() != 6 || f.unnamed("default") != 1 || f.unnamed("other") != 0 {
		t.Errorf("once the name is gone: %d blobs, %d entries, %d", f.count(), f.unnamed("default"), f.unnamed("other"))
	}
}

// A phase does not wait for a process that has locked the names of a namespace, because that process may wait for names
// that the phase has locked.
func TestSweepDoesNotWaitForNamesWithinAPhase(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.attach("default", f.image("amd64", 1), "signature")
	w := newSweeper(Sweep{Store: f.store, Before: time.Now().Add(time.Hour)})
	defer w.close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := w.mark(ctx); err != nil {
		t.Fatal(err)
	}
	m := w.names["default"]
	move, err := m.dir.LockIndex(ctx, unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	err = w.dropFrom(ctx, m)
	if err != nil || f.unnamed("default") != 1 {
		t.Errorf("%v, %d entries", err, f.unnamed("default"))
	}
	disk.Release(move)
	f.sweep(time.Now().Add(time.Hour), false)
	if f.unnamed("default") != 0 {
		t.Errorf("%d entries after the next sweep", f.unnamed("default"))
	}
}

// The entries of other tools keep their targets, whatever these documents refer to.
func TestSweepSparesReferrersOfOtherTools(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.name("default", "a", f.image("amd64", 1))
	d := f.attach("default", f.image("arm64", 1), "signature")
	raw := `{"schemaVersion":2,"manifests":[{"mediaType":"` + d.MediaType + `","digest":"` + string(d.Digest) + `","size":` + strconv.FormatInt(d.Size, 10) + `}]}`
	damage(t, f.store.Root()+"/index.json", raw)
	if f.sweep(time.Now().Add(time.Hour), false); f.count() != 6 {
		t.Errorf("%d blobs are left", f.count())
	}
}

// A chain of referrers is followed once, whatever the order of their entries.
func TestSweepFollowsChainsOfReferrers(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	root := f.image("amd64", 1)
	chain := []v1.Descriptor{root}
	var entries []layout.Referrer
	for i := range 50 {
		config := f.add(v1.MediaTypeEmptyJSON, []byte(strconv.Itoa(i)))
		d := f.add(v1.MediaTypeImageManifest, v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: config, Subject: &chain[i]})
		chain = append(chain, d)
		entries = append([]layout.Referrer{{Descriptor: d, Subject: chain[i].Digest}}, entries...)
	}
	// The first document claims to depend on the last one, too.
	entries = append(entries, layout.Referrer{Descriptor: chain[1], Subject: chain[50].Digest, Tag: "sha256-x.sig"})
	if err := f.names("default").AddReferrers(t.Context(), entries); err != nil {
		t.Fatal(err)
	}
	f.name("default", "a", root)
	later := time.Now().Add(time.Hour)
	if swept := f.sweep(later, false); len(swept) != 0 {
		t.Errorf("%d were swept", len(swept))
	}
	if err := f.names("default").Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if f.sweep(later, false); f.count() != 0 || f.unnamed("default") != 0 {
		t.Errorf("%d blobs, %d entries", f.count(), f.unnamed("default"))
	}
}
