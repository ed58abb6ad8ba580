package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"distkit/content"

	"github.com/containerd/errdefs"
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

// A container keeps its image as a name would, and its chains are told; one that does not parse
// stops the sweep, one without a record keeps nothing.
func TestSweepSparesWhatContainersPin(t *testing.T) {
	f := newFixture(t)
	pinned, loose := f.image("amd64", 2), f.image("arm64", 1)
	record := func(ns, id, text string) {
		dir := filepath.Join(f.store.Root(), "containers", ns, id)
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "container.json"), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	record("default", "a", fmt.Sprintf(`{"id":"a","image":{"name":"x","digest":%q},"snapshot":{"driver":"native","key":"k"}}`, pinned.Digest))
	record("other", "gone", `{"image":{"digest":"sha256:`+strings.Repeat("0", 64)+`"}}`)
	record("other", "empty", "")
	later := time.Now().Add(time.Hour)
	var needed Needed
	s := Sweep{Store: f.store, Before: later, DryRun: true, Snapshots: func(_ context.Context, n Needed) error { needed = n; return nil }}
	if err := s.Run(t.Context(), func(content.Info) error { return nil }); err != nil {
		t.Fatal(err)
	}
	layers, err := f.walker("").Layers(t.Context(), pinned)
	if err != nil || len(needed.Chains) != 2 || !needed.Chains[layers[0].ChainID] || !needed.Chains[layers[1].ChainID] {
		t.Errorf("chains %v, layers %v: %v", needed.Chains, layers, err)
	}
	if len(needed.Containers) != 2 || needed.Containers[0] != (Pin{"default", "a", pinned.Digest, "native", "k"}) {
		t.Errorf("containers %+v", needed.Containers)
	}
	if swept := f.sweep(later, false); len(swept) != 3 || !swept[loose.Digest] {
		t.Errorf("swept %v", swept)
	}
	record("other", "torn", `{"image":`)
	if err := (Sweep{Store: f.store, Before: later}).Run(t.Context(), func(content.Info) error { return nil }); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("with a torn record: %v", err)
	}
}

// While a sweep has the names nobody changes one, and who waits for that can be called off.
func TestNamesWaitForASweep(t *testing.T) {
	f := newFixture(t)
	d := f.image("amd64", 1)
	f.name("default", "a", d)
	f.name("other", "a", d)
	thaw, err := Sweep{Store: f.store}.freeze(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, namespace := range []string{"default", "other", "new"} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if _, err := f.names(namespace).Create(ctx, "b", d); namespace != "new" && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", namespace, err)
		}
		cancel()
		if namespace == "other" {
			thaw()
		}
	}
	for _, namespace := range []string{"default", "other"} {
		if _, err := f.names(namespace).Create(t.Context(), "b", d); err != nil {
			t.Error(err)
		}
	}
}
