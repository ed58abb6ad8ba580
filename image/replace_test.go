package image

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestReplaceAllIsOneChange(t *testing.T) {
	names := open(t, t.TempDir()+"/store", DefaultNamespace)
	old := target("o")
	old.Annotations = map[string]string{"k": "v"}
	first, err := names.Create(t.Context(), "a", old)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []Image{{Name: "b c", Target: target("b")}, {Name: "b", Target: v1.Descriptor{Digest: "x"}}} {
		if err := names.ReplaceAll(t.Context(), []Image{{Name: "a", Target: target("n")}, bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if a, err := names.Get("a"); err != nil || a.Target.Digest != first.Target.Digest {
		t.Errorf("a failed change left %+v, %v", a, err)
	}
	gone := v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString("gone"), Size: 4}
	if err := names.ReplaceAll(t.Context(), []Image{{Name: "a", Target: target("n")}, {Name: "b", Target: gone}}); !errdefs.IsNotFound(err) {
		t.Errorf("a target that is not here: %v", err)
	}
	err = names.ReplaceAll(t.Context(), []Image{
		{Name: "b", Target: target("x"), Labels: map[string]string{"l": "b"}},
		{Name: "a", Target: target("y"), Labels: map[string]string{"l": "a"}},
		{Name: "b", Target: target("z")},
	})
	if err != nil {
		t.Fatal(err)
	}
	all, err := names.List()
	if err != nil || len(all) != 2 {
		t.Fatalf("%+v, %v", all, err)
	}
	a, b := all[0], all[1]
	if a.Target.Digest != target("y").Digest || len(a.Labels) != 2 || a.Labels["k"] != "v" || a.Labels["l"] != "a" || !a.CreatedAt.Equal(first.CreatedAt) || !a.UpdatedAt.After(first.UpdatedAt) {
		t.Errorf("replaced: %+v", a)
	}
	if b.Target.Digest != target("z").Digest || b.Labels["l"] != "b" || b.CreatedAt.IsZero() {
		t.Errorf("new: %+v", b)
	}
	if err := names.ReplaceAll(t.Context(), nil); err != nil {
		t.Error(err)
	}
}
