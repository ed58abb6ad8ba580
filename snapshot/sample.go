package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"distkit/disk"
	"distkit/disk/sys"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A tool that copies or packs files may lose some of their properties. In a store that was copied by such a tool, files
// have other owners or modes, or files reappear that a layer deleted, and nothing in a snapshot shows that. So before
// the first snapshot a sample is made beside the snapshots: files with the properties that such tools lose. If the
// sample has lost one, so have the snapshots.

// sampleDir is the sample's directory. Its file sampleMade has a line for each property that could be set.
const (
	sampleDir  = "sample"
	sampleMade = "made"
)

// A property is an attribute of files that a copy may lose.
type property struct {
	name string
	make func(dir int) error
	kept func(dir int) bool
}

const (
	sampleFile  = "file"
	sampleMode  = 0o2715 // has a set-ID bit, which a change of owner clears
	sampleValue = "1"
)

// sampleCapability is an empty set of file capabilities, of version 2.
const sampleCapability = "\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

var properties = []property{
	{"owner", func(dir int) error { return sys.Fchownat(dir, sampleFile, os.Geteuid()+1, os.Getegid()+1, 0) },
		func(dir int) bool {
			var file, top unix.Stat_t
			return statIn(dir, sampleFile, &file) && statIn(dir, ".", &top) && file.Uid != top.Uid && file.Gid != top.Gid
		}},
	{"mode", func(dir int) error { return sys.Fchmodat(dir, sampleFile, sampleMode, 0) },
		func(dir int) bool {
			var st unix.Stat_t
			return statIn(dir, sampleFile, &st) && st.Mode == unix.S_IFREG|sampleMode
		}},
	{"link", func(dir int) error { return sys.Linkat(dir, sampleFile, dir, "link", 0) },
		func(dir int) bool {
			var a, b unix.Stat_t
			return statIn(dir, sampleFile, &a) && statIn(dir, "link", &b) && a.Ino == b.Ino
		}},
	{"device", func(dir int) error { return sys.Mknodat(dir, "device", unix.S_IFCHR, 0) },
		func(dir int) bool {
			var st unix.Stat_t
			return statIn(dir, "device", &st) && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
		}},
	{"empty", func(dir int) error { return sys.Mkdirat(dir, "empty", 0o700) },
		func(dir int) bool {
			var st unix.Stat_t
			return statIn(dir, "empty", &st) && st.Mode&unix.S_IFMT == unix.S_IFDIR
		}},
	xattr("user.distkit", sampleValue),
	xattr("trusted.distkit", sampleValue),
	xattr("security.capability", sampleCapability),
}

func statIn(dir int, name string, st *unix.Stat_t) bool {
	return sys.Fstatat(dir, name, st, unix.AT_SYMLINK_NOFOLLOW) == nil
}

// xattr returns the property of having an extended attribute. It counts as kept in a user namespace where the kernel
// does not show such attributes.
func xattr(name, value string) property {
	path := func(dir int) string { return fmt.Sprintf("/proc/self/fd/%d/%s", dir, sampleFile) }
	return property{name, func(dir int) error { return sys.Lsetxattr(path(dir), name, []byte(value), 0) },
		func(dir int) bool {
			if strings.HasPrefix(name, "trusted.") && sys.InUserNamespace() {
				return true // the kernel does not show them there
			}
			_, err := unix.Lgetxattr(path(dir), name, nil)
			return !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOENT)
		}}
}

// makeSample makes a sample with the properties that this process can set on this file system. If another process has
// made one first, that one stays.
func (s *Snapshotter) makeSample(ctx context.Context) error {
	tmp, held, err := s.scratch(ctx)
	if err != nil {
		return err
	}
	defer disk.Release(held)
	defer os.RemoveAll(tmp) // has no effect after the rename
	tree := disk.Tree(tmp)
	if err := tree.WriteFile(sampleFile, nil, 0o600); err != nil {
		return err
	}
	d, err := tree.OpenDir(".")
	if err != nil {
		return err
	}
	defer d.Close()
	var made strings.Builder
	for _, p := range properties {
		if p.make(int(d.Fd())) == nil && p.kept(int(d.Fd())) {
			made.WriteString(p.name + "\n")
		}
	}
	if err := tree.WriteFile(sampleMade, []byte(made.String()), 0o600); err != nil {
		return err
	}
	if err := os.Rename(tmp, filepath.Join(s.dir, sampleDir)); !errors.Is(err, fs.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

// lost returns the name of a property that the sample has lost. It returns "" if none is lost, or if there is no
// sample.
func (s *Snapshotter) lost() (string, error) {
	made, err := s.files.ReadFile(filepath.Join(sampleDir, sampleMade), 4<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	d, err := s.files.OpenDir(sampleDir)
	if err != nil {
		return "", err
	}
	defer d.Close()
	words := strings.Fields(string(made))
	for _, p := range properties {
		if slices.Contains(words, p.name) && !p.kept(int(d.Fd())) {
			return p.name, nil
		}
	}
	return "", nil
}

// intact returns FailedPrecondition if the snapshots are a copy that has lost properties of files. The check runs until
// it has succeeded once in this process.
func (s *Snapshotter) intact() error {
	if s.whole.Load() {
		return nil
	}
	lost, err := s.lost()
	if err != nil {
		return err
	}
	if lost == "" {
		s.whole.Store(true)
		return nil
	}
	return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(
		"the snapshots in %s are a copy that has not kept all of their files (%s): remove them, and unpack the images again", s.dir, lost))
}

// lookupIntact is lookup for a snapshot whose files will be used: it also fails if intact does.
func (s *Snapshotter) lookupIntact(key string) (entry, error) {
	e, err := s.lookup(key)
	if err == nil {
		err = s.intact()
	}
	return e, err
}

// renew is intact for a caller that makes a snapshot. If the store is a copy that has lost properties but has no
// snapshots left, it makes a new sample.
func (s *Snapshotter) renew(ctx context.Context) error {
	if s.intact() == nil {
		return nil
	}
	l, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer l.unlock()
	ids, err := s.ids()
	if err != nil {
		return err
	}
	if len(ids) > 0 {
		return s.intact() // another process may have made a new one
	}
	if err := s.files.RemoveAll(sampleDir); err != nil {
		return err
	}
	return s.makeSample(ctx)
}
