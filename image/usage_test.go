package image

import (
	"testing"
	"time"

	"distkit/content"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// The exclusive size of a name is the size of the blobs that a sweep deletes after the name is removed.
func TestUsageIsWhatASweepFrees(t *testing.T) {
	f := newFixture(t)
	amd64, arm64, alone := f.image("amd64", 3), f.image("arm64", 2), f.image("s390x", 1)
	gone := v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString("gone"), Size: 4}
	index := f.add(v1.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"mediaType":"`+v1.MediaTypeImageIndex+`","manifests":[`+f.json(amd64)+`,`+f.json(arm64)+`,`+f.json(gone)+`]}`))
	inIndex := f.add(v1.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"mediaType":"`+v1.MediaTypeImageIndex+`","manifests":[`+f.json(arm64)+`]}`))
	pinned, labelled := f.image("riscv64", 1), f.image("ppc64le", 1)
	f.add("", []byte("loose"))
	f.record("other", "container", `{"image":{"digest":"`+string(pinned.Digest)+`"}}`)
	if _, err := f.store.Update(t.Context(), content.Info{Digest: labelled.Digest, Labels: map[string]string{LabelRoot: ""}}); err != nil {
		t.Fatal(err)
	}
	names := map[string]v1.Descriptor{"index": index, "amd64": amd64, "in-index": inIndex, "alone": alone, "twice": alone, "pinned": pinned, "labelled": labelled}
	for name, d := range names {
		f.name("default", name, d)
	}
	f.name("other", "amd64", amd64)

	free := func() (size int64) {
		_, err := Sweep{Store: f.store, Before: time.Now().Add(time.Hour), DryRun: true}.Run(t.Context(), func(b content.Info) error {
			size += b.Size
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return size
	}
	usage := func(namespace string) map[string]Usage {
		all, err := f.names(namespace).Usage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		of := map[string]Usage{}
		for _, u := range all {
			if of[u.Name] = u; u.Size != u.Shared+u.Exclusive {
				t.Errorf("%+v", u)
			}
		}
		return of
	}
	check := func() {
		t.Helper()
		all := usage("default")
		if len(all) != len(names) {
			t.Errorf("%d names are told of %d", len(all), len(names))
		}
		for name, d := range names {
			before := free()
			if err := f.names("default").Delete(t.Context(), name); err != nil {
				t.Fatal(err)
			}
			if freed := free() - before; all[name].Exclusive != freed || all[name].Target != d.Digest {
				t.Errorf("%s frees %d: %+v", name, freed, all[name])
			}
			f.name("default", name, d)
		}
	}
	check()
	all := usage("default")
	if all["index"].Exclusive != index.Size || all["index"].Size <= all["amd64"].Size || all["twice"].Exclusive != 0 || all["alone"].Size != all["twice"].Size {
		t.Errorf("%+v", all)
	}
	if u := usage("other"); len(u) != 1 || u["amd64"] != all["amd64"] {
		t.Errorf("%+v", u)
	}
	for _, name := range []string{"twice", "in-index"} {
		if err := f.names("default").Delete(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		delete(names, name)
	}
	check()
	if all := usage("default"); all["alone"].Exclusive != all["alone"].Size || all["index"].Exclusive <= index.Size {
		t.Errorf("%+v", all)
	}
}
