package image

import (
	"testing"

	"distkit/content"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestReplaceAllIsOneChange(t *testing.T) {
	store, err := content.Open(t.TempDir() + "/store")
	if err != nil {
		t.Fatal(err)
	}
	names, err := OpenNames(store, DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	target := func(s string) v1.Descriptor {
		return v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString(s), Size: 1}
	}
	first, err := names.Create("a", v1.Descriptor{Digest: target("old").Digest, Annotations: map[string]string{"k": "v"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []Image{{Name: "b c", Target: target("b")}, {Name: "b", Target: v1.Descriptor{Digest: "x"}}} {
		if err := names.ReplaceAll([]Image{{Name: "a", Target: target("new")}, bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if a, err := names.Get("a"); err != nil || a.Target.Digest != first.Target.Digest {
		t.Errorf("a failed change left %+v, %v", a, err)
	}
	err = names.ReplaceAll([]Image{
		{Name: "b", Target: target("1"), Labels: map[string]string{"l": "b"}},
		{Name: "a", Target: target("2"), Labels: map[string]string{"l": "a"}},
		{Name: "b", Target: target("3")},
	})
	if err != nil {
		t.Fatal(err)
	}
	all, err := names.List()
	if err != nil || len(all) != 2 {
		t.Fatalf("%+v, %v", all, err)
	}
	a, b := all[0], all[1]
	if a.Target.Digest != target("2").Digest || len(a.Labels) != 1 || a.Labels["k"] != "v" || !a.CreatedAt.Equal(first.CreatedAt) || !a.UpdatedAt.After(first.UpdatedAt) {
		t.Errorf("replaced: %+v", a)
	}
	if b.Target.Digest != target("3").Digest || b.Labels["l"] != "b" || b.CreatedAt.IsZero() {
		t.Errorf("new: %+v", b)
	}
	if err := names.ReplaceAll(nil); err != nil {
		t.Error(err)
	}
}
