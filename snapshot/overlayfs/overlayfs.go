// Package overlayfs is the snapshot driver that keeps each snapshot as a layer, and shows it on top of its parents with
// the kernel's overlayfs. Preparing a snapshot takes the same time, however large the parents are.
package overlayfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"distkit/disk"
	"distkit/disk/sys"
	"distkit/snapshot"
	"distkit/snapshot/internal/overlay"
	"distkit/snapshot/internal/tree"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Name is the driver's name.
const Name = "overlayfs"

// maxLower is the kernel's limit (OVL_MAX_STACK).
const maxLower = 500

// Driver is the overlayfs driver. A snapshot's directory has fs, its layer, and work, the kernel's scratch space.
//
// In a user namespace the extended attributes trusted.* can't be set. A store whose first snapshot is made in one has a
// file userxattr beside its snapshots: all its overlays then use user.overlay.* instead, whoever mounts them.
type Driver struct{}

var _ snapshot.Driver = Driver{}

func (Driver) Name() string    { return Name }
func (Driver) MaxParents() int { return maxLower }

// marker is the file beside the snapshots that selects overlay.UserOptions.
const marker = "userxattr"

func (Driver) Init(dir string) error {
	if !sys.InUserNamespace() {
		return nil
	}
	return disk.Tree(dir).WriteFile(marker, nil, 0o600)
}

func (Driver) Whiteouts(dir string) string {
	if usesUserxattr(dir) {
		return "overlay-user"
	}
	return "overlay"
}

func usesUserxattr(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, marker))
	return err == nil
}

// optionsIn returns the options for all overlay mounts of the store in dir.
func optionsIn(dir string) []string {
	if usesUserxattr(dir) {
		return overlay.UserOptions
	}
	return overlay.Options
}

func (Driver) Create(_ context.Context, t snapshot.Tree) error {
	if err := os.Mkdir(t.FS(), 0o755); err != nil {
		return err
	}
	if err := os.Chmod(t.FS(), 0o755); err != nil { // whatever the umask is
		return err
	}
	if isView(t) {
		return nil
	}
	if len(t.Parents) > 0 {
		// The mount shows the attributes of the upper layer's root directory.
		if err := tree.CopyAttributes(lower(t.Parents[0]), t.FS()); err != nil {
			return fmt.Errorf("copy attributes of the parent's root: %w", err)
		}
	}
	return os.Mkdir(work(t), 0o711)
}

func lower(parent string) string  { return filepath.Join(parent, "fs") }
func work(t snapshot.Tree) string { return filepath.Join(t.Dir, "work") }
func isView(t snapshot.Tree) bool { return t.Kind == snapshot.View }

// bindSource returns the directory of a snapshot that has a single layer, and so needs no overlay.
func bindSource(t snapshot.Tree) string {
	switch {
	case len(t.Parents) == 0:
		return t.FS()
	case len(t.Parents) == 1 && isView(t):
		return lower(t.Parents[0])
	}
	return ""
}

// Mounts returns an overlay whose source identifies the snapshot in mountinfo, or a bind mount of a single layer.
func (Driver) Mounts(t snapshot.Tree) ([]snapshot.Mount, error) {
	if src := bindSource(t); src != "" {
		return []snapshot.Mount{snapshot.BindOf(t, src)}, nil
	}
	source, err := t.MountSource()
	if err != nil {
		return nil, err
	}
	var o []string
	if isView(t) {
		o = append(o, "ro", "nosuid", "nodev") // like DefaultMountOptions
	} else {
		o = append(o, "workdir="+overlay.Escape(work(t), `\,`), "upperdir="+overlay.Escape(t.FS(), `\,`))
	}
	lowers := make([]string, len(t.Parents))
	for i, p := range t.Parents {
		lowers[i] = overlay.Escape(lower(p), `\:,`)
	}
	o = append(o, optionsIn(filepath.Dir(t.Dir))...)
	o = append(o, "lowerdir="+strings.Join(lowers, ":"))
	return []snapshot.Mount{{Type: "overlay", Source: source, Options: o}}, nil
}

func (Driver) Mount(t snapshot.Tree, target string, o snapshot.MountOptions) error {
	if src := bindSource(t); src != "" {
		return snapshot.BindMount(src, target, isView(t), o)
	}
	l, dir, err := layersOf(t)
	if err != nil {
		return err
	}
	l.Access = o
	if err := l.Check(dir); err != nil {
		return err
	}
	if o.Users != nil {
		return l.MountMapped(dir, target)
	}
	return overlay.In(dir, func() error { return l.Mount(target) })
}

// layersOf returns the layers of the snapshot's overlay, as paths relative to dir.
func layersOf(t snapshot.Tree) (l overlay.Layers, dir string, err error) {
	dir = filepath.Dir(t.Dir)
	l = overlay.Layers{ReadOnly: isView(t), Options: optionsIn(dir)}
	if l.Source, err = t.MountSource(); err != nil {
		return l, dir, err
	}
	if !slices.Contains(l.Options, "userxattr") && sys.InUserNamespace() {
		return l, dir, errdefs.ErrPermissionDenied.WithMessage("the store was begun outside of this user namespace, which can't mount its snapshots")
	}
	if !isView(t) {
		l.Work = filepath.Join(filepath.Base(t.Dir), "work")
		l.Upper = filepath.Join(filepath.Base(t.Dir), "fs")
	}
	for _, p := range t.Parents {
		l.Lower = append(l.Lower, filepath.Join(filepath.Base(p), "fs"))
	}
	return l, dir, nil
}

func (Driver) Open(t snapshot.Tree) (*os.File, error) {
	if src := bindSource(t); src != "" {
		return snapshot.OpenFiles(src)
	}
	l, dir, err := layersOf(t)
	if err != nil {
		return nil, err
	}
	if err := l.Check(dir); err != nil {
		return nil, err
	}
	return l.Open(dir, t.Dir)
}

// Check makes two layers, and an overlay of them that is detached from the tree of mounts.
func (Driver) Check(_ context.Context, dir string) error {
	scratch, err := os.MkdirTemp(dir, ".overlayfs-")
	if err != nil {
		return fmt.Errorf("check overlayfs: %w", err)
	}
	defer tree.Remove(scratch)
	for _, d := range []string{"1", "2", "2/fs", "2/work"} {
		if err := os.Mkdir(filepath.Join(scratch, d), 0o755); err != nil {
			return fmt.Errorf("check overlayfs: %w", err)
		}
	}
	if err := os.Mkdir(filepath.Join(scratch, "1/fs"), 0o755); err != nil {
		return fmt.Errorf("check overlayfs: %w", err)
	}
	l := overlay.Layers{Lower: []string{"1/fs"}, Upper: "2/fs", Work: "2/work", Source: "overlay", Options: overlay.Options}
	attribute := "trusted.overlay.opaque"
	if sys.InUserNamespace() {
		l.Options = overlay.UserOptions
		attribute = "user.overlay.opaque"
	}
	err = overlay.In(scratch, func() error {
		// Without these attributes the kernel still mounts, but then can't delete files of lower layers.
		if err := unix.Setxattr(l.Upper, attribute, []byte("n"), 0); err != nil {
			return fmt.Errorf("set extended attribute %s: %w", attribute, err)
		}
		if err := unix.Mknod("2/whiteout", unix.S_IFCHR, 0); err != nil {
			return fmt.Errorf("make a whiteout: %w", err)
		}
		return l.Try()
	})
	switch {
	case err == nil:
		return nil
	case errdefs.IsPermissionDenied(err), errors.Is(err, unix.EPERM):
		return errdefs.ErrPermissionDenied.WithMessage("overlayfs needs root, or a user namespace: " + err.Error())
	}
	return errdefs.ErrNotImplemented.WithMessage("overlayfs doesn't work here: " + err.Error())
}

func (Driver) Usage(ctx context.Context, t snapshot.Tree) (u snapshot.Usage, err error) {
	u.Size, u.Inodes, err = tree.Usage(ctx, t.FS())
	return u, err
}

func (Driver) Remove(_ context.Context, dir string) error { return tree.Remove(dir) }
