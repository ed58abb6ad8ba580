package image

import (
	"testing"
	"time"

	"distkit/content"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func (f fixture) sweep(before time.Time, dry bool) map[digest.Digest]bool {
	f.t.Helper()
	swept := map[digest.Digest]bool{}
	err := Sweep{Store: f.store, Before: before, DryRun: dry}.Run(f.t.Context(), func(info content.Info) error {
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

func (f fixture) name(namespace, name string, d v1.Descriptor) {
	f.t.Helper()
	if _, err := open(f.t, f.store.Root(), namespace).Create(name, d); err != nil {
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
	if err := open(t, f.store.Root(), "default").Delete("a"); err != nil {
		t.Fatal(err)
	}
	if f.sweep(later, false); f.count() != 3 {
		t.Errorf("%d blobs are left once the name is gone", f.count())
	}
}

// What a strange document points at stays, a subject too, and so does what an entry without a
// name points at.
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
	err := Sweep{Store: f.store, Before: time.Now().Add(time.Hour)}.Run(t.Context(), func(content.Info) error { return nil })
	if err == nil || f.count() != 4 {
		t.Errorf("%v; %d blobs are left", err, f.count())
	}
}
