// Package snapdriver lets a program snap-driver-NAME on PATH make the directories of snapshots: see snap-driver(7).
// Package snapshot keeps the names, records and locks. The program's form decides how the snapshots are mounted. The
// program itself is the user's choice, but what it prints and makes is not trusted.
package snapdriver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"distkit/disk"
	"distkit/disk/program"
	"distkit/disk/sys"
	"distkit/errclass"
	"distkit/snapshot"
	"distkit/snapshot/internal/tree"
	"distkit/snapshot/native"
	"distkit/snapshot/overlayfs"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	prefix    = "snap-driver-"
	maxOutput = 4 << 10
)

// forms maps a program's form, the kind of files that it makes, to the driver that mounts them.
var forms = map[string]snapshot.Driver{"tree": native.Driver{}, "layer": overlayfs.Driver{}}

// Driver is a program, with the driver of its form for everything that the program does not do.
type Driver struct {
	snapshot.Driver
	name string
}

// Exists reports whether PATH has a program for a driver of that name.
func Exists(name string) bool {
	_, err := exec.LookPath(prefix + name)
	return program.IsName(name) && err == nil
}

// Names returns the names of the drivers that are programs on PATH.
func Names() (names []string) {
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		files, _ := os.ReadDir(dir) // a directory in PATH may be missing
		for _, f := range files {
			if name, ok := strings.CutPrefix(f.Name(), prefix); ok && Exists(name) {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Open asks a program for its form. NotImplemented: it is not on PATH. DataLoss: its answer is not a form.
func Open(ctx context.Context, name string) (Driver, error) {
	d := Driver{name: name}
	said, err := d.run(ctx, "/", "form")
	if err != nil {
		return d, err
	}
	form, ok := strings.CutSuffix(said, "\n")
	if d.Driver = forms[form]; d.Driver == nil || !ok {
		return d, errclass.Errorf(errdefs.ErrDataLoss, "%s%s printed no form", prefix, name)
	}
	return d, nil
}

// run runs the program in a directory and returns its output. A failure is never classed as NotFound or AlreadyExists:
// callers would take that for a statement about the snapshot.
func (d Driver) run(ctx context.Context, dir, verb string, args ...string) (string, error) {
	runtime.LockOSThread() // the program gets its parent-death signal when this thread ends, so keep the thread
	defer runtime.UnlockOSThread()
	p, err := program.Start(ctx, func(c *exec.Cmd) {
		c.Dir, c.Env = dir, os.Environ()
		c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	}, prefix+d.name, append([]string{verb}, args...)...)
	if err != nil {
		return "", err
	}
	defer p.Close()
	b, err := io.ReadAll(io.LimitReader(p, maxOutput+1))
	if err == nil && len(b) > maxOutput {
		err = errclass.Errorf(errdefs.ErrDataLoss, "%s%s printed more than %d bytes", prefix, d.name, maxOutput)
	}
	if errdefs.IsNotFound(err) || errdefs.IsAlreadyExists(err) {
		err = errors.New(err.Error())
	}
	return string(b), err
}

// runIn runs the program in the directory of the store's snapshots. It passes the directory dir of a snapshot, and
// those of its parents, as names relative to that.
func (d Driver) runIn(ctx context.Context, verb, dir string, parents ...string) (string, error) {
	within := filepath.Join("snapshots", d.name)
	i := strings.LastIndex(dir, "/"+within+"/")
	if i < 0 {
		return "", errclass.Errorf(errdefs.ErrInvalidArgument, "%s is no snapshot of %s", dir, d.name)
	}
	root := dir[:i]
	store, err := disk.Tree(root).OpenDir(within)
	if err != nil {
		return "", err
	}
	defer store.Close()
	names := make([]string, 0, 1+len(parents))
	for _, p := range append([]string{dir}, parents...) {
		names = append(names, strings.TrimPrefix(p, filepath.Join(root, within)+"/"))
	}
	return d.run(ctx, fmt.Sprintf("/proc/self/fd/%d", store.Fd()), verb, names...)
}

// do is runIn for a verb without output.
func (d Driver) do(ctx context.Context, verb, dir string, parents ...string) error {
	said, err := d.runIn(ctx, verb, dir, parents...)
	if err == nil && said != "" {
		err = errclass.Errorf(errdefs.ErrDataLoss, "%s%s %s printed something", prefix, d.name, verb)
	}
	return err
}

// Name returns the program's name without the prefix snap-driver-.
func (d Driver) Name() string { return d.name }

// Check tries to mount a snapshot of the program's form, then asks the program.
func (d Driver) Check(ctx context.Context, dir string) error {
	if err := d.Driver.Check(ctx, dir); err != nil {
		return err
	}
	_, err := d.run(ctx, dir, "check")
	return err
}

// Create lets the program fill the directory. A view has no files of its own, so the program is not run for it.
func (d Driver) Create(ctx context.Context, t snapshot.Tree) error {
	if t.Kind == snapshot.View {
		return d.Driver.Create(ctx, t)
	}
	for _, p := range t.Parents {
		if err := checkDir(p, "fs"); err != nil {
			return err
		}
	}
	if err := d.do(ctx, "create", t.Dir, t.Parents...); err != nil {
		return err
	}
	err := checkDir(t.Dir, "fs")
	if err == nil && d.Whiteouts(filepath.Dir(t.Dir)) != "" {
		err = checkDir(t.Dir, "work")
	}
	if err != nil {
		return errclass.Errorf(errdefs.ErrDataLoss, "%s%s made no snapshot: %w", prefix, d.name, err)
	}
	if len(t.Parents) > 0 {
		return tree.CopyAttributes(t.ParentFS(), t.FS())
	}
	return os.Chmod(t.FS(), 0o755)
}

// checkDir returns an error if the directory name of a snapshot is a symbolic link or a mount point. Its files would
// then not be in the store, or it could not be removed.
func checkDir(dir, name string) error {
	store, err := disk.Tree(filepath.Dir(dir)).OpenDir(".")
	if err != nil {
		return err
	}
	defer store.Close()
	name = filepath.Join(filepath.Base(dir), name)
	fd, err := sys.OpenBeneath(int(store.Fd()), name, sys.OpenDir, unix.RESOLVE_NO_XDEV)
	if errors.Is(err, unix.EXDEV) {
		err = sys.ErrMounted
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	return unix.Close(fd)
}

// Usage asks the program. If the program does not know, it measures the files.
func (d Driver) Usage(ctx context.Context, t snapshot.Tree) (u snapshot.Usage, err error) {
	if t.Kind == snapshot.View {
		return d.Driver.Usage(ctx, t)
	}
	said, err := d.runIn(ctx, "usage", t.Dir, t.Parents...)
	if errdefs.IsNotImplemented(err) {
		return d.Driver.Usage(ctx, t)
	}
	if err != nil {
		return u, err
	}
	size, inodes, _ := strings.Cut(strings.TrimSuffix(said, "\n"), " ")
	if u.Size, err = number(size); err == nil {
		u.Inodes, err = number(inodes)
	}
	if err != nil {
		return snapshot.Usage{}, errclass.Errorf(errdefs.ErrDataLoss, "%s%s printed no usage: two numbers are wanted", prefix, d.name)
	}
	return u, nil
}

func number(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err
}

// Remove lets the program undo whatever deleting files does not undo, and then deletes the files. A directory whose
// name is not a number was not made by the store. The program is not run for it, because a script might pass its name
// to a shell.
func (d Driver) Remove(ctx context.Context, dir string) error {
	if _, err := strconv.ParseUint(filepath.Base(dir), 10, 64); err == nil {
		if err := d.do(ctx, "remove", dir); err != nil && !errdefs.IsNotImplemented(err) {
			return err
		}
	}
	return d.Driver.Remove(ctx, dir)
}
