package layer

import (
	"archive/tar"
	"bytes"
	"io"
	"testing"

	"github.com/containerd/errdefs"
)

// The limit on holes that holds for a layer read for the first time holds for a plain archive too.
func TestPlainHoles(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "file", Size: 1 << 20, Mode: 0o600}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	for _, holes := range []int64{0, maxHoles + 1<<30} { // holes read in earlier files
		p := NewPlain(t.Context(), bytes.NewReader(b.Bytes()))
		if _, err := p.Next(); err != nil {
			t.Fatal(err)
		}
		p.holes.read = holes
		if _, err := io.ReadAll(p); errdefs.IsInvalidArgument(err) != (holes > 0) {
			t.Errorf("after holes of %d bytes: %v", holes, err)
		}
	}
}
