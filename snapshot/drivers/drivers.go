// Package drivers knows the snapshot drivers and chooses between them.
package drivers

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"distkit/snapshot"
	"distkit/snapshot/btrfs"
	"distkit/snapshot/native"
	"distkit/snapshot/overlayfs"

	"github.com/containerd/errdefs"
)

// all is every driver, the preferred one first.
var all = []snapshot.Driver{overlayfs.Driver{}, btrfs.Driver{}, native.Driver{}}

// Names are the drivers' names, the preferred one first.
func Names() []string {
	names := make([]string, len(all))
	for i, d := range all {
		names[i] = d.Name()
	}
	return names
}

// Open opens the store's snapshots of the driver called name. Where name is empty it is the
// one that the store has snapshots of, else the first that works here: so a store stays with
// the driver it began with. InvalidArgument for an unknown name, NotImplemented or
// PermissionDenied where the driver can't work here and the store has nothing of it yet.
func Open(root, name string, o snapshot.Options) (*snapshot.Snapshotter, error) {
	d, err := choose(root, name)
	if err != nil {
		return nil, err
	}
	return snapshot.Open(root, d, o)
}

func choose(root, name string) (snapshot.Driver, error) {
	for _, d := range all {
		if (name == "" || name == d.Name()) && used(root, d) {
			return d, nil
		}
	}
	for _, d := range all {
		if name != "" && name != d.Name() {
			continue
		}
		err := check(root, d)
		if err == nil {
			return d, nil
		}
		if name != "" {
			return nil, err
		}
	}
	return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("unknown snapshotter %q: one of %s", name, strings.Join(Names(), ", ")))
}

// Used are the names of the drivers that the store has, or had, snapshots of.
func Used(root string) []string {
	var names []string
	for _, d := range all {
		if _, err := os.Lstat(filepath.Join(root, "snapshots", d.Name())); err == nil {
			names = append(names, d.Name())
		}
	}
	return names
}

// used tells whether the store has snapshots of a driver.
func used(root string, d snapshot.Driver) bool {
	f, err := os.Open(filepath.Join(root, "snapshots", d.Name()))
	if err != nil {
		// What can't be read is there all the same, and opening it says why not.
		return !errors.Is(err, fs.ErrNotExist)
	}
	defer f.Close()
	for {
		names, err := f.Readdirnames(64)
		for _, n := range names {
			if _, err := strconv.ParseUint(n, 10, 64); err == nil {
				return true
			}
		}
		if err != nil {
			return false
		}
	}
}

// check tries a driver in the store, or where the store will be.
func check(root string, d snapshot.Driver) error {
	dir, err := filepath.Abs(filepath.Join(root, "snapshots"))
	if err != nil {
		return err
	}
	for {
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() {
			return d.Check(dir)
		}
		dir = filepath.Dir(dir)
	}
}

// Status is what there is to say of a driver.
type Status struct {
	Driver  string `json:"driver"`
	Works   bool   `json:"works"`
	Used    bool   `json:"used"`             // the store has snapshots of it
	Default bool   `json:"default"`          // it is used where none is named
	Reason  string `json:"reason,omitempty"` // why it doesn't work
}

// List tries every driver in the store at root.
func List(root string) []Status {
	var out []Status
	preferred, _ := choose(root, "")
	for _, d := range all {
		s := Status{Driver: d.Name(), Used: used(root, d), Default: preferred != nil && preferred.Name() == d.Name()}
		if err := check(root, d); err != nil {
			s.Reason = err.Error()
		} else {
			s.Works = true
		}
		out = append(out, s)
	}
	return out
}
