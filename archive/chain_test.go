package archive

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func TestChainID(t *testing.T) {
	a, b, c := digest.FromString("a"), digest.FromString("b"), digest.FromString("c")
	one, err := ChainID("", a)
	if err != nil || one != a {
		t.Errorf("of one layer: %s, %v", one, err)
	}
	two, err := ChainID(one, b)
	if want := digest.FromString(a.String() + " " + b.String()); err != nil || two != want {
		t.Errorf("of two layers: %s, %v", two, err)
	}
	three, err := ChainID(two, c)
	if want := digest.FromString(two.String() + " " + c.String()); err != nil || three != want {
		t.Errorf("of three layers: %s, %v", three, err)
	}
	for _, bad := range []digest.Digest{"", "sha256:", "sha256:xyz", "a", digest.Digest("sha256:" + strings.Repeat("A", 64))} {
		if _, err := ChainID("", bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("of %q: %v", bad, err)
		}
		if _, err := ChainID(bad, a); bad != "" && !errdefs.IsInvalidArgument(err) {
			t.Errorf("above %q: %v", bad, err)
		}
	}
}
