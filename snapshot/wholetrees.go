package snapshot

import (
	"context"
	"io"
	"os"

	"github.com/containerd/errdefs"
)

// WholeTrees is how drivers show snapshots that each hold their whole tree: by a bind mount,
// of the parent's where it is a view of one.
type WholeTrees struct{}

// Settle refuses: a whole tree can't be made without its parent's.
func (WholeTrees) Settle(context.Context, Tree, io.Reader) error {
	return errdefs.ErrNotImplemented.WithMessage("layers are applied on their parents")
}

// Mounts says how to show the snapshot.
func (WholeTrees) Mounts(t Tree) ([]Mount, error) {
	return []Mount{BindOf(t, whole(t))}, nil
}

// BindOf is the bind mount that shows the directory source as the snapshot's files.
func BindOf(t Tree, source string) Mount {
	access := "rw"
	if t.Kind == View {
		access = "ro"
	}
	return Mount{Type: "bind", Source: source, Options: append([]string{"bind", access}, DefaultMountOptions(t.Kind).words()...)}
}

// Mount shows the snapshot at target.
func (WholeTrees) Mount(t Tree, target string, o MountOptions) error {
	return BindMount(whole(t), target, t.Kind == View, o)
}

// Open opens the tree.
func (WholeTrees) Open(t Tree) (*os.File, error) { return OpenFiles(whole(t)) }

// Whiteouts is none: a snapshot is made on its parent.
func (WholeTrees) Whiteouts(string) string { return "" }

func whole(t Tree) string {
	if t.Kind == View && len(t.Parents) > 0 {
		return t.ParentFS()
	}
	return t.FS()
}
