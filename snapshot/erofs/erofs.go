// Package erofs is the snapshot driver that keeps a layer as its plain archive. It shows a chain of layers as one EROFS
// image: an index, whose files' data are ranges of the archives. So no file of a layer is ever unpacked. An active
// snapshot is an overlay with an upper directory on that image. When it is committed, its changes become an archive.
package erofs

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"distkit/disk"
	"distkit/disk/sys"
	"distkit/erofs"
	"distkit/errclass"
	"distkit/snapshot"
	"distkit/snapshot/internal/overlay"
	"distkit/snapshot/internal/tree"
	"distkit/snapshot/overlayfs"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Name is the driver's name.
const Name = "erofs"

// maxLower equals overlayfs's limit, so that a chain works with either driver. Each layer is an open file while it is
// mounted.
const maxLower = 500

// Names in a snapshot's directory, besides fs, the upper directory of an active snapshot, and work, overlayfs's scratch
// space.
const (
	applied   = snapshot.LayerDir // a layer stored by Stack
	archived  = "changes"         // a layer made of fs by a commit
	imageName = "image"           // the EROFS image of the snapshot and its ancestors, made when first needed
)

// Driver is the erofs driver.
//
// The kernel parses an image with root's privileges, but the store may have been written by a stranger. So only images
// are mounted that this machine has made since it booted, from archives that it has verified since then. Package erofs
// keeps seals of both; whatever has no valid seal is verified or made again. The directory of the snapshots must belong
// to this user alone, so that nobody else can write to a mounted image.
type Driver struct{}

var _ snapshot.Archiver = Driver{}

func (Driver) Name() string            { return Name }
func (Driver) MaxParents() int         { return maxLower }
func (Driver) Init(string) error       { return nil }
func (Driver) Whiteouts(string) string { return snapshot.ArchiveForm }
func (Driver) Settle(context.Context, snapshot.Tree, io.Reader) error {
	return errdefs.ErrNotImplemented.WithMessage("a layer that is stored as an archive leaves nothing unresolved")
}

func upperless(t snapshot.Tree) bool { return t.Kind == snapshot.View }

// Create makes the directories of an overlay. The upper one becomes the root directory.
func (Driver) Create(ctx context.Context, t snapshot.Tree) error {
	if err := os.Mkdir(t.FS(), 0o755); err != nil {
		return err
	}
	if err := os.Chmod(t.FS(), 0o755); err != nil { // whatever the umask is
		return err
	}
	if !upperless(t) {
		if err := os.Mkdir(filepath.Join(t.Dir, "work"), 0o711); err != nil {
			return err
		}
	}
	if len(t.Parents) == 0 {
		return nil
	}
	lower, err := mountLower(ctx, t)
	if err != nil {
		return err
	}
	defer unix.Close(lower)
	if upperless(t) {
		return nil
	}
	if err := tree.CopyAttributes(procPath(lower)+"/.", t.FS()); err != nil {
		return fmt.Errorf("copy attributes of the parent's root: %w", err)
	}
	return nil
}

// mountLower mounts the image of a snapshot's ancestors, detached from the tree of mounts.
func mountLower(ctx context.Context, t snapshot.Tree) (int, error) {
	c, err := openChain(t.Parents)
	if err != nil {
		return -1, err
	}
	defer c.close()
	image, err := c.image(ctx)
	if err != nil {
		return -1, err
	}
	defer image.Close()
	return attach(image, c.data())
}

// A chain is the stored layers of a snapshot's ancestors.
type chain struct {
	store  disk.Tree // the directory of all snapshots
	top    string    // name of the topmost ancestor's directory in store
	layers []*erofs.Layer
	left   map[string]int64 // what a newly made image can't hold, by kind
}

// openChain opens the layers of the directories parents, the nearest first.
func openChain(parents []string) (*chain, error) {
	c := &chain{store: disk.Tree(filepath.Dir(parents[0])), top: filepath.Base(parents[0])}
	if err := c.open(parents); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

func (c *chain) open(parents []string) error {
	if err := c.trusted(); err != nil {
		return err
	}
	for _, p := range slices.Backward(parents) {
		id := filepath.Base(p)
		name := filepath.Join(id, applied)
		if _, err := c.store.Stat(name); errors.Is(err, fs.ErrNotExist) {
			name = filepath.Join(id, archived)
		} else if err != nil {
			return err
		}
		l, err := erofs.Open(c.store, name)
		if err != nil {
			return fmt.Errorf("snapshot %s: %w", id, err)
		}
		c.layers = append(c.layers, l)
	}
	return nil
}

func (c *chain) close() {
	for _, l := range c.layers {
		l.Close()
	}
}

func (c *chain) data() []*os.File {
	files := make([]*os.File, len(c.layers))
	for i, l := range c.layers {
		files[i] = l.File
	}
	return files
}

// trusted returns an error if another user could write to a mounted image.
func (c *chain) trusted() error {
	d, err := c.store.OpenDir(".")
	if err != nil {
		return err
	}
	defer d.Close()
	var st unix.Stat_t
	var sf unix.Statfs_t
	if err := unix.Fstat(int(d.Fd()), &st); err != nil {
		return err
	}
	if err := unix.Fstatfs(int(d.Fd()), &sf); err != nil {
		return err
	}
	switch {
	case st.Uid != uint32(os.Geteuid()) || st.Mode&0o077 != 0:
		return errclass.Errorf(errdefs.ErrPermissionDenied, "%s is not this user's alone: others could change an image that is mounted", d.Name())
	case slices.Contains(remote, uint32(sf.Type)):
		return errclass.Errorf(errdefs.ErrNotImplemented, "%s is on a file system of another machine or process, which could change an image that is mounted", d.Name())
	}
	return nil
}

// remote lists file systems whose files others can change: NFS, SMB, CIFS, FUSE, 9p, Ceph, AFS.
var remote = []uint32{0x6969, 0x517b, 0xfe534d42, 0xff534d42, 0x65735546, 0x01021997, 0x00c36400, 0x5346414f}

// recipe returns the text for the image's seal: the layers that the image is made of.
func (c *chain) recipe() (string, error) {
	var b strings.Builder
	for _, l := range c.layers {
		identity, err := erofs.Identity(l.File)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "%s %s\n", identity, l.DiffID)
	}
	return b.String(), nil
}

// image opens the chain's image. It makes the image first if there is none with a seal for these layers.
func (c *chain) image(ctx context.Context) (*os.File, error) {
	recipe, err := c.recipe()
	if err != nil {
		return nil, err
	}
	if f, err := c.sealedImage(recipe); f != nil || err != nil {
		return f, err
	}
	// One process makes the image, others wait for it.
	lock, err := c.store.LockFile(ctx, filepath.Join(c.top, imageName+".lock"), os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
	if err != nil {
		return nil, fmt.Errorf("lock EROFS image: %w", err)
	}
	defer disk.Release(lock)
	if f, err := c.sealedImage(recipe); f != nil || err != nil {
		return f, err
	}
	f, err := c.make(ctx)
	if err != nil {
		return nil, fmt.Errorf("make EROFS image: %w", err)
	}
	return f, nil
}

func (c *chain) sealedImage(recipe string) (*os.File, error) {
	f, err := c.store.Open(filepath.Join(c.top, imageName))
	if errors.Is(err, fs.ErrNotExist) || errdefs.IsFailedPrecondition(err) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	text, err := erofs.Sealed(f)
	if err == nil && text == recipe {
		return f, nil
	}
	f.Close()
	return nil, err
}

func (c *chain) make(ctx context.Context) (*os.File, error) {
	b := erofs.NewBuilder(erofs.Options{Index: true, Scratch: c.store.Path(c.top)})
	defer b.Close()
	for _, l := range c.layers {
		if err := b.AddStored(ctx, l); err != nil {
			return nil, fmt.Errorf("snapshot %s: %w", filepath.Base(filepath.Dir(filepath.Dir(l.Name()))), err)
		}
	}
	c.left = b.Unset()
	recipe, err := c.recipe()
	if err != nil {
		return nil, err
	}
	name := filepath.Join(c.top, imageName)
	if f, err := c.store.Open(name); err == nil { // an image of other layers
		erofs.Unseal(f)
		f.Close()
	}
	if err := c.store.RemoveAll(name); err != nil { // delete what a stranger may have put there, even a directory
		return nil, err
	}
	// Not synced: after a crash the image has no seal.
	if err := c.store.ReplaceBy(name, 0o400, false, func(f *os.File) error { return b.Write(ctx, f) }); err != nil {
		return nil, err
	}
	f, err := c.store.Open(name)
	if err == nil {
		if err = erofs.Seal(f, recipe); err == nil {
			return f, nil
		}
		f.Close()
	}
	return nil, err
}

// plain reports whether the snapshot consists of its directory fs only.
func plain(t snapshot.Tree) bool { return len(t.Parents) == 0 }

// Mounts returns two mounts on the same directory: the image, and the overlay that has it as lower directory. Whoever
// makes the first must pass the image's files on to the kernel unchanged, which mount(8) does not do.
func (Driver) Mounts(t snapshot.Tree) ([]snapshot.Mount, error) {
	if plain(t) {
		return []snapshot.Mount{snapshot.BindOf(t, t.FS())}, nil
	}
	c, err := openChain(t.Parents)
	if err != nil {
		return nil, err
	}
	defer c.close()
	image, err := c.image(context.Background())
	if err != nil {
		return nil, err
	}
	image.Close()
	source, err := t.MountSource()
	if err != nil {
		return nil, err
	}
	lower := snapshot.Mount{Type: "erofs", Source: c.store.Path(filepath.Join(c.top, imageName)), Options: []string{"ro"}}
	for _, l := range c.layers {
		lower.Options = append(lower.Options, "device="+l.Name())
	}
	o := slices.Clone(overlay.Options)
	if upperless(t) {
		o = append([]string{"ro", "nosuid", "nodev"}, append(o, "lowerdir="+snapshot.Here+":"+overlay.Escape(t.FS(), `\:,`))...)
	} else {
		o = append(o, "workdir="+overlay.Escape(filepath.Join(t.Dir, "work"), `\,`), "upperdir="+overlay.Escape(t.FS(), `\,`), "lowerdir="+snapshot.Here)
	}
	return []snapshot.Mount{lower, {Type: "overlay", Source: source, Options: o}}, nil
}

func (Driver) Mount(t snapshot.Tree, target string, o snapshot.MountOptions) error {
	if plain(t) {
		return snapshot.BindMount(t.FS(), target, upperless(t), o)
	}
	return onImage(t, o, func(l overlay.Layers) error {
		if o.Users != nil {
			return l.MountMapped(filepath.Dir(t.Dir), target)
		}
		return l.Mount(target)
	})
}

func (Driver) Open(t snapshot.Tree) (root *os.File, err error) {
	if plain(t) {
		return snapshot.OpenFiles(t.FS())
	}
	if upperless(t) { // the snapshot is active, but opened without its own changes
		image, err := mountLower(context.Background(), t)
		if err != nil {
			return nil, err
		}
		defer unix.Close(image)
		return overlay.OpenRoot(image)
	}
	err = onImage(t, snapshot.MountOptions{}, func(l overlay.Layers) error {
		root, err = l.Open(filepath.Dir(t.Dir), t.Dir)
		return err
	})
	return root, err
}

// onDetached makes an overlay on a detached image. Kernels before 6.15 refuse that with EINVAL.
var onDetached = func(l overlay.Layers, f func(overlay.Layers) error) error { return f(l) }

// onImage calls f with the layers of a snapshot's overlay and with the working directory set for their relative paths.
// For a view it adds the view's own, empty directory as a second lower layer. An overlay needs two, and as an overlay
// the view can be found in mountinfo.
func onImage(t snapshot.Tree, o snapshot.MountOptions, f func(overlay.Layers) error) error {
	lower, err := mountLower(context.Background(), t)
	if err != nil {
		return err
	}
	defer unix.Close(lower)
	if o.Users != nil {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(o.Users.Fd())}
		if err := sys.MountSetattr(lower, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return snapshot.MountError("map the owners of an EROFS image", err)
		}
	}
	dir, id := filepath.Split(t.Dir)
	l := overlay.Layers{Options: overlay.Options, ReadOnly: upperless(t), Access: o}
	if l.Source, err = t.MountSource(); err != nil {
		return err
	}
	if l.ReadOnly {
		l.Lower = []string{filepath.Join(id, "fs")}
	} else {
		l.Upper, l.Work = filepath.Join(id, "fs"), filepath.Join(id, "work")
	}
	if err := l.Check(dir); err != nil {
		return err
	}
	return overlay.In(dir, func() error {
		with := l
		with.Lower = append([]string{procPath(lower)}, l.Lower...)
		err := onDetached(with, f)
		if !errors.Is(err, unix.EINVAL) {
			return err
		}
		target, merr := os.MkdirTemp(t.Dir, snapshot.BrieflyMounted+"*")
		if merr != nil {
			return errors.Join(err, merr)
		}
		defer os.Remove(target)
		if merr := sys.MoveMount(lower, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); merr != nil {
			return errors.Join(err, snapshot.MountError("mount EROFS image", merr))
		}
		with.Lower[0] = target
		return errors.Join(f(with), sys.Unmount(target, unix.MNT_DETACH))
	})
}

// Archive makes a layer of what an active snapshot has changed.
func (Driver) Archive(ctx context.Context, t snapshot.Tree, diff snapshot.Diff) error {
	id, store := filepath.Base(t.Dir), disk.Tree(filepath.Dir(t.Dir))
	if _, err := store.Stat(filepath.Join(id, applied)); err == nil { // stored by Stack
		l, err := erofs.Open(store, filepath.Join(id, applied))
		if err != nil {
			return err
		}
		return l.Close()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if diff == nil {
		return errdefs.ErrNotImplemented.WithMessage("this program can't make a layer of a snapshot's files")
	}
	name := filepath.Join(id, archived)
	if err := removeLayer(store, name); err != nil { // left by a commit that failed
		return err
	}
	if err := store.Mkdir(name, 0o700); err != nil {
		return err
	}
	upper, err := snapshot.OpenFiles(t.FS())
	if err != nil {
		return err
	}
	defer upper.Close()
	from, to, err := os.Pipe()
	if err != nil {
		return err
	}
	defer from.Close()
	ended := make(chan error, 1)
	go func() {
		err := diff(ctx, upper, to)
		to.Close()
		ended <- err
	}()
	err = erofs.StorePlain(store.Path(name), from)
	from.Close() // makes diff return
	return cmp.Or(err, <-ended)
}

// Committed deletes the files that Archive has made a layer of.
func (Driver) Committed(t snapshot.Tree) error {
	store, id := disk.Tree(filepath.Dir(t.Dir)), filepath.Base(t.Dir)
	fs, err := store.OpenDir(filepath.Join(id, "fs"))
	if err != nil {
		return err
	}
	defer fs.Close()
	return errors.Join(sys.EachName(int(fs.Fd()), func(name string) error {
		return tree.Remove(filepath.Join(t.FS(), name))
	}), tree.Remove(filepath.Join(t.Dir, "work")))
}

// Complete makes the image of a chain.
func (Driver) Complete(ctx context.Context, parents []string) (left map[string]int64, err error) {
	c, err := openChain(parents)
	if err != nil {
		return nil, err
	}
	defer c.close()
	f, err := c.image(ctx)
	if err != nil {
		return nil, err
	}
	return c.left, f.Close()
}

// Usage measures the archive and image of a committed snapshot, and the files of an active one.
func (Driver) Usage(ctx context.Context, t snapshot.Tree) (u snapshot.Usage, err error) {
	names := []string{"fs"}
	if t.Kind == snapshot.Committed {
		names = []string{applied, archived}
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(t.Dir, imageName), &st); err == nil {
			u = snapshot.Usage{Size: st.Blocks * 512, Inodes: 1}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return u, err
		}
	}
	for _, name := range names {
		size, inodes, err := tree.Usage(ctx, filepath.Join(t.Dir, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return u, err
		}
		u.Size, u.Inodes = u.Size+size, u.Inodes+inodes
	}
	return u, nil
}

// Remove deletes a snapshot's directory and the seals of its files.
func (Driver) Remove(_ context.Context, dir string) error {
	store, id := disk.Tree(filepath.Dir(dir)), filepath.Base(dir)
	for _, name := range []string{applied, archived} {
		if err := removeLayer(store, filepath.Join(id, name)); err != nil {
			return err
		}
	}
	if f, err := store.Open(filepath.Join(id, imageName)); err == nil {
		erofs.Unseal(f)
		f.Close()
	}
	return tree.Remove(dir)
}

// removeLayer deletes a stored layer, if there is one.
func removeLayer(store disk.Tree, name string) error {
	if l, err := erofs.Open(store, name); err == nil {
		erofs.Unseal(l.File)
		l.Close()
	}
	return tree.Remove(store.Path(name))
}

// Check mounts an image of a tiny layer, and an overlay on it.
func (Driver) Check(ctx context.Context, dir string) error {
	if sys.InUserNamespace() || os.Geteuid() != 0 {
		return errdefs.ErrPermissionDenied.WithMessage("only the host's root can mount EROFS images: take another snapshotter, as overlayfs or native")
	}
	if err := (overlayfs.Driver{}).Check(ctx, dir); err != nil {
		return err
	}
	scratch, err := os.MkdirTemp(dir, ".erofs-")
	if err != nil {
		return fmt.Errorf("check EROFS: %w", err)
	}
	defer tree.Remove(scratch)
	err = probe(ctx, scratch)
	switch {
	case err == nil, errdefs.IsPermissionDenied(err):
		return err
	case errors.Is(err, unix.EPERM):
		return errdefs.ErrPermissionDenied.WithMessage("EROFS needs root: " + err.Error())
	}
	return errdefs.ErrNotImplemented.WithMessage("EROFS doesn't work here: " + err.Error())
}

// probe stores a layer and opens an overlay on its image.
func probe(ctx context.Context, scratch string) (err error) {
	layer, upper := filepath.Join(scratch, "1"), filepath.Join(scratch, "2")
	for _, dir := range []string{layer, filepath.Join(layer, applied), upper} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "file", Mode: 0o644}), w.Close()); err != nil {
		return err
	}
	if err := erofs.StorePlain(filepath.Join(layer, applied), &b); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, Driver{}.Remove(ctx, layer)) }()
	t := snapshot.Tree{Dir: upper, Kind: snapshot.Active, Parents: []string{layer}}
	if err := (Driver{}).Create(ctx, t); err != nil {
		return err
	}
	root, err := Driver{}.Open(t)
	if err != nil {
		return err
	}
	defer root.Close()
	_, err = disk.StatAt(root, "file")
	return err
}
