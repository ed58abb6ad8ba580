// Package native is the snapshot driver that keeps each snapshot as a full copy of its parent. It works on every
// filesystem and without privileges. Where files can share blocks (btrfs, XFS) a copy takes little space, but its time
// still grows with the number of files.
package native

import (
	"context"
	"fmt"
	"os"

	"distkit/snapshot"
	"distkit/snapshot/internal/tree"
)

// Name is the driver's name.
const Name = "native"

// Driver is the native driver. A snapshot's directory has fs, the whole tree. That of a view with a parent stays empty,
// since the view shows the parent's tree.
type Driver struct{ snapshot.WholeTrees }

var _ snapshot.Driver = Driver{}

func (Driver) Name() string                        { return Name }
func (Driver) Check(context.Context, string) error { return nil }
func (Driver) Init(string) error                   { return nil }
func (Driver) MaxParents() int                     { return 0 }

func (Driver) Create(ctx context.Context, t snapshot.Tree) error {
	if err := os.Mkdir(t.FS(), 0o755); err != nil {
		return err
	}
	if len(t.Parents) > 0 && t.Kind != snapshot.View {
		return tree.Copy(ctx, t.ParentFS(), t.FS())
	}
	if err := os.Chmod(t.FS(), 0o755); err != nil { // whatever the umask is
		return fmt.Errorf("set mode of root: %w", err)
	}
	return nil
}

func (Driver) Usage(ctx context.Context, t snapshot.Tree) (u snapshot.Usage, err error) {
	u.Size, u.Inodes, err = tree.Usage(ctx, t.FS())
	return u, err
}

func (Driver) Remove(_ context.Context, dir string) error { return tree.Remove(dir) }
