package image

import (
	"maps"
	"reflect"
	"testing"

	"distkit/content"
	"distkit/disk/layout"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// An image is made from one that was pulled from a registry, so the registry has its blobs.
func TestSources(t *testing.T) {
	f := newFixture(t)
	names, err := OpenNames(f.store, DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	name := func(names *Names, name string, d v1.Descriptor, labels ...string) {
		t.Helper()
		d.Annotations = map[string]string{}
		for i := 0; i < len(labels); i += 2 {
			d.Annotations[layout.LabelSource+labels[i]] = labels[i+1]
		}
		if _, err := names.Replace(t.Context(), name, d); err != nil {
			t.Fatal(err)
		}
	}
	base := f.image("amd64", 2)
	layer := func(i int) v1.Descriptor {
		layers, err := f.walker("").Layers(t.Context(), base)
		if err != nil {
			t.Fatal(err)
		}
		return layers[i].Descriptor
	}
	own := f.add(v1.MediaTypeImageLayer, []byte("own layer"))
	config := f.add(v1.MediaTypeImageConfig, []byte(`{"own":"config"}`))
	derived := f.add(v1.MediaTypeImageManifest, v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: config,
		Layers: []v1.Descriptor{layer(0), layer(1), own, own}})
	// Only one platform of the index is stored.
	gone := v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString("gone"), Size: 4}
	name(names, "reg.example/base:1", f.index(gone, base), "reg.example", "team/base,../up,A B,team/app", "other.example", "elsewhere")
	name(names, "reg.example/team/app:1", derived)
	broken := f.add(v1.MediaTypeImageManifest, []byte(`{"mediaType":"text/html"}`))
	broken.Annotations = map[string]string{layout.LabelSource + "reg.example": "team/app/broken"}
	names.entry(t, "broken", broken)

	check := func(d v1.Descriptor, host, repository string, want map[digest.Digest]string) {
		t.Helper()
		got, err := names.Sources(t.Context(), Walker{Store: f.store}, d, host, repository)
		if err != nil {
			t.Fatal(err)
		}
		m := map[digest.Digest]string{}
		for _, s := range got {
			m[s.Digest] = s.Repository
		}
		if !maps.Equal(m, want) {
			t.Errorf("%s of %s: %v, want %v", repository, host, got, want)
		}
	}
	both := func(s string) map[digest.Digest]string {
		return map[digest.Digest]string{layer(0).Digest: s, layer(1).Digest: s}
	}
	check(derived, "reg.example", "team/app", both("team/base"))
	check(derived, "reg.example", "you/app", both("team/base"))
	check(derived, "reg.example", "team/app/x", both("team/app"))
	check(derived, "other.example", "elsewhere", nil)
	check(derived, "other.example", "x", both("elsewhere"))
	check(derived, "reg.example:5000", "x", nil)
	check(f.index(derived, gone), "reg.example", "team/app", both("team/base"))

	// The short names of docker.io are those in library/.
	name(names, "docker.io/library/base:1", base, "docker.io", "base")
	check(derived, "docker.io", "me/app", both("library/base"))
	check(derived, "docker.io", "base", nil)

	// The label of a blob itself takes precedence.
	if _, err := f.store.Update(t.Context(), content.Info{Digest: own.Digest, Labels: map[string]string{layout.LabelSource + "reg.example": "z/own,team/own"}}); err != nil {
		t.Fatal(err)
	}
	want := both("team/base")
	want[own.Digest] = "team/own"
	check(derived, "reg.example", "team/app", want)

	// The images of another namespace are not used.
	if names, err = OpenNames(f.store, "other"); err != nil {
		t.Fatal(err)
	}
	check(derived, "reg.example", "team/app", map[digest.Digest]string{own.Digest: "team/own"})

	// The origin of another image says nothing about this one.
	name(names, "n", base, "a", "1", "b", "2")
	name(names, "n", derived, "b", "3")
	img, err := names.Get("n")
	if want := map[string]string{layout.LabelSource + "b": "3"}; err != nil || !reflect.DeepEqual(img.Labels, want) || img.Target.Digest != derived.Digest {
		t.Errorf("%v, %v", img, err)
	}
}
