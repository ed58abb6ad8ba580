// Package drivers knows all snapshot drivers, and selects one by name or by what works in a store.
package drivers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/snapshot"
	"distkit/snapshot/btrfs"
	"distkit/snapshot/erofs"
	"distkit/snapshot/native"
	"distkit/snapshot/overlayfs"
	"distkit/snapshot/snapdriver"

	"github.com/containerd/errdefs"
)

// all lists the built-in drivers, the preferred one first.
var all = []snapshot.Driver{overlayfs.Driver{}, btrfs.Driver{}, erofs.Driver{}, native.Driver{}}

// Names returns the names of the built-in drivers, the preferred one first.
func Names() []string {
	names := make([]string, len(all))
	for i, d := range all {
		names[i] = d.Name()
	}
	return names
}

// Open opens the store's snapshots of a driver. name is a built-in driver, or a program (snap-driver(7)). If name is
// "", Open uses the built-in driver that the store has snapshots of, or else the first that works here, so that a store
// keeps its first driver. A store never selects a program. InvalidArgument: an unknown name. NotImplemented,
// PermissionDenied: the driver does not work here, and the store has no snapshots of it.
func Open(ctx context.Context, root, name string, o snapshot.Options) (*snapshot.Snapshotter, error) {
	root, namespace, err := layout.Resolve(root, o.Namespace)
	if err != nil {
		return nil, err
	}
	o.Namespace = namespace
	d, err := choose(ctx, root, name)
	if err != nil {
		return nil, err
	}
	return snapshot.Open(root, d, o)
}

// OpenRecorded is Open for a name from a record in the store. A record must not decide which program runs.
// PermissionDenied: the driver is a program, and the environment does not name it too.
func OpenRecorded(ctx context.Context, root, name string, o snapshot.Options) (*snapshot.Snapshotter, error) {
	if name != "" && builtin(name) == nil && name != os.Getenv(variable) {
		return nil, errdefs.ErrPermissionDenied.WithMessage(fmt.Sprintf(
			"the snapshotter %.80q of a record would be a program, which is run only if %s names it too", name, variable))
	}
	return Open(ctx, root, name, o)
}

// variable is the environment variable with the user's choice of driver.
const variable = "CONTAINERD_SNAPSHOTTER"

// builtin returns the built-in driver of that name, or nil.
func builtin(name string) snapshot.Driver {
	for _, d := range all {
		if d.Name() == name {
			return d
		}
	}
	return nil
}

// named returns the driver of that name.
func named(ctx context.Context, name string) (snapshot.Driver, error) {
	if d := builtin(name); d != nil {
		return d, nil
	}
	if !snapdriver.Exists(name) {
		return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(
			"unknown snapshotter %q: one of %s, or a program snap-driver-NAME on PATH", name, strings.Join(Names(), ", ")))
	}
	return snapdriver.Open(ctx, name)
}

func choose(ctx context.Context, root, name string) (snapshot.Driver, error) {
	candidates := all
	if name != "" {
		d, err := named(ctx, name)
		if err != nil {
			return nil, err
		}
		candidates = []snapshot.Driver{d}
	}
	for _, d := range candidates {
		// If the directory of a driver can't be read, fail: another driver would hide its snapshots.
		if there, err := used(root, d.Name()); err != nil {
			return nil, err
		} else if there {
			return d, nil
		}
	}
	var err error
	for _, d := range candidates {
		if err = check(ctx, root, d); err == nil {
			return d, nil
		}
	}
	return nil, err
}

// Used returns the names of the drivers that the store has, or had, snapshots of. A program is listed only if the
// environment names it.
func Used(root string) ([]string, error) {
	root, _, err := layout.Resolve(root, "")
	if err != nil {
		return nil, err
	}
	candidates := Names()
	if name := os.Getenv(variable); builtin(name) == nil && snapdriver.Exists(name) {
		candidates = append(candidates, name)
	}
	var names []string
	for _, name := range candidates {
		_, err := disk.Tree(root).Stat(filepath.Join("snapshots", name))
		if err == nil {
			names = append(names, name)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return names, nil
}

// used reports whether the store has, or had, snapshots of a driver.
func used(root, name string) (bool, error) {
	f, err := disk.Tree(root).OpenDir(filepath.Join("snapshots", name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	for {
		names, err := f.Readdirnames(64)
		for _, n := range names {
			if _, err := strconv.ParseUint(n, 10, 64); err == nil {
				return true, nil
			}
		}
		if err == io.EOF {
			return false, nil
		}
		if err != nil {
			return false, err
		}
	}
}

// check tries a driver in the store, or where the store would be created.
func check(ctx context.Context, root string, d snapshot.Driver) error {
	root, err := filepath.Abs(root)
	if err != nil {
		return err
	}
	switch dir, err := disk.Tree(root).OpenDir("snapshots"); {
	case err == nil:
		defer dir.Close()
		return d.Check(ctx, filepath.Join(root, "snapshots"))
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	for dir := root; ; dir = filepath.Dir(dir) {
		fi, err := os.Stat(dir)
		switch {
		case err == nil && fi.IsDir():
			return d.Check(ctx, dir)
		case err == nil:
			return errdefs.ErrInvalidArgument.WithMessage(dir + " is not a directory")
		case !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir):
			return err
		}
	}
}

// Status describes a driver in a store.
type Status struct {
	Driver  string `json:"driver"`
	Works   bool   `json:"works"`
	Used    bool   `json:"used"`             // the store has snapshots of it
	Default bool   `json:"default"`          // used if no driver is named
	Reason  string `json:"reason,omitempty"` // why it does not work
}

// List tries every built-in driver in the store at root, and lists the programs on PATH.
func List(ctx context.Context, root string) []Status {
	if store, _, err := layout.Resolve(root, ""); err == nil {
		root = store
	}
	programs := slices.DeleteFunc(snapdriver.Names(), func(name string) bool { return builtin(name) != nil })
	var out []Status
	preferred, _ := choose(ctx, root, "")
	for _, name := range append(Names(), programs...) {
		s := Status{Driver: name, Default: preferred != nil && preferred.Name() == name}
		d, err := named(ctx, name)
		if err == nil {
			err = check(ctx, root, d)
		}
		var uerr error
		s.Used, uerr = used(root, name)
		if err = cmp.Or(uerr, err); err != nil {
			s.Reason = err.Error()
		} else {
			s.Works = true
		}
		out = append(out, s)
	}
	return out
}
