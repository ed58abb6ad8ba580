package snapshot

import (
	"context"
	"io"
	"os"

	"github.com/containerd/errdefs"
)

// WholeTrees implements mounting for drivers whose snapshots each hold a whole tree: by a bind mount, and for a view
// with a parent by one of the parent's tree.
type WholeTrees struct{}

// Settle returns NotImplemented: a whole tree can't be made without its parent.
func (WholeTrees) Settle(context.Context, Tree, io.Reader) error {
	return errdefs.ErrNotImplemented.WithMessage("layers are applied on their parents")
}

// Mounts returns the one bind mount.
func (WholeTrees) Mounts(t Tree) ([]Mount, error) {
	return []Mount{BindOf(t, whole(t))}, nil
}

// BindOf returns the bind mount of the directory source as the files of t.
func BindOf(t Tree, source string) Mount {
	access := "rw"
	if t.Kind == View {
		access = "ro"
	}
	return Mount{Type: "bind", Source: source, Options: append([]string{"bind", access}, DefaultMountOptions(t.Kind).words()...)}
}

// Mount mounts the snapshot on target.
func (WholeTrees) Mount(t Tree, target string, o MountOptions) error {
	return BindMount(whole(t), target, t.Kind == View, o)
}

// Open opens the root directory of the tree.
func (WholeTrees) Open(t Tree) (*os.File, error) { return OpenFiles(whole(t)) }

// Whiteouts returns "": snapshots are always made on their parents.
func (WholeTrees) Whiteouts(string) string { return "" }

func whole(t Tree) string {
	if t.Kind == View && len(t.Parents) > 0 {
		return t.ParentFS()
	}
	return t.FS()
}
