package overlayfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"distkit/disk/sys"
	"distkit/snapshot"
	"distkit/snapshot/internal/tree"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A note is something that a layer could not decide without its parents, in the form of dist-apply(1).
type note struct{ kind, path, more string }

// maxNote bounds a note: two paths and a word. maxNotes and maxBytes bound all notes of a layer, since a layer of a few
// kilobytes can cause gigabytes of them. A layer with more notes is applied again, on its parents.
const (
	maxNote  = 64 << 10
	maxNotes = 1 << 17
	maxBytes = 16 << 20
)

// A settler completes the layer in upper with what its parents, as seen in lower, decide.
type settler struct {
	ctx   context.Context
	upper *os.File
	lower *os.File // nil if there are no parents
	stage *os.File // scratch directory for copies of lower files, on upper's file system
}

func (Driver) Settle(ctx context.Context, t snapshot.Tree, unresolved io.Reader) error {
	notes, err := parseNotes(unresolved)
	if err != nil || len(notes) == 0 {
		return err
	}
	s := settler{ctx: ctx}
	if s.upper, err = os.Open(t.FS()); err != nil {
		return err
	}
	defer s.upper.Close()
	if len(t.Parents) > 0 {
		below := t
		below.Kind = snapshot.View
		if s.lower, err = (Driver{}).Open(below); err != nil {
			return err
		}
		defer s.lower.Close()
	}
	stage := filepath.Join(t.Dir, "settle")
	if err := os.Mkdir(stage, 0o700); err != nil {
		return err
	}
	if s.stage, err = os.Open(stage); err != nil {
		return err
	}
	defer s.stage.Close()
	if err := s.settle(notes); err != nil {
		return err
	}
	return tree.Remove(stage)
}

// parseNotes parses notes: three fields each, ended by NUL.
func parseNotes(r io.Reader) ([]note, error) {
	var all []note
	b := bufio.NewReaderSize(r, maxNote)
	for size := 0; ; {
		var fields [3]string
		for i := range fields {
			f, err := b.ReadSlice(0)
			if err == io.EOF && i == 0 && len(f) == 0 {
				return all, nil
			}
			if err == io.EOF || errors.Is(err, bufio.ErrBufferFull) {
				return nil, errdefs.ErrInvalidArgument.WithMessage("what is unresolved is cut short, or was not written by dist-apply")
			}
			if err != nil {
				return nil, fmt.Errorf("read what is unresolved: %w", err)
			}
			fields[i] = string(f[:len(f)-1])
		}
		n := note{fields[0], fields[1], fields[2]}
		if !proper(n.path) || n.kind == "link" && !proper(n.more) {
			return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("the list of what is unresolved has an invalid path: %q %q", n.path, n.more))
		}
		if size += len(n.kind) + len(n.path) + len(n.more); size > maxBytes || len(all) == maxNotes {
			return nil, applyAgain("the layer leaves more unresolved than is kept in memory")
		}
		all = append(all, n)
	}
}

func proper(p string) bool { return p == "." || p != "" && path.Clean("/"+p) == "/"+p }

// openAt opens a path below a directory without following symbolic links.
func openAt(at int, p string, flags int) (*os.File, error) {
	fd, err := sys.OpenBeneath(at, p, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: p, Err: err}
	}
	return os.NewFile(uintptr(fd), p), nil
}

// notFound reports whether an error means that there is no file at a path.
func notFound(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// kindAt returns the type (S_IFMT) of the file at a path, or 0 if there is none. A whiteout counts as a file.
func kindAt(root *os.File, p string) (mode uint32, st unix.Stat_t, err error) {
	if root == nil {
		return 0, st, nil
	}
	f, err := openAt(int(root.Fd()), p, unix.O_PATH)
	if notFound(err) {
		return 0, st, nil
	}
	if err != nil {
		return 0, st, err
	}
	defer f.Close()
	if err := sys.Fstat(int(f.Fd()), &st); err != nil {
		return 0, st, err
	}
	return st.Mode & unix.S_IFMT, st, nil
}

// lowerKind returns the type of the file that the parents show at a path, or 0.
func (s *settler) lowerKind(p string) (uint32, error) {
	typ, st, err := kindAt(s.lower, p)
	if err == nil && typ == unix.S_IFCHR && st.Rdev == 0 {
		typ = 0 // a whiteout in the lowest layer
	}
	return typ, err
}

func applyAgain(format string, a ...any) error {
	return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(format, a...) + ": apply the layer again, on its mounted parent")
}

func (s *settler) settle(notes []note) error {
	implicit := map[string]bool{} // by path: no entry of the layer names the directory
	for _, n := range notes {
		switch n.kind {
		case "again":
			return applyAgain("%s: %s", n.path, n.more)
		case "directory", "named":
			implicit[n.path] = n.kind == "directory"
		case "whiteout", "link":
		default:
			return errdefs.ErrNotImplemented.WithMessage(fmt.Sprintf("the list of what is unresolved has a record %q, which this version does not know", n.kind))
		}
	}
	if s.lower != nil {
		for p := range implicit {
			switch typ, err := s.lowerKind(p); {
			case err != nil:
				return err
			case typ == 0:
				delete(implicit, p)
			case typ != unix.S_IFDIR:
				return applyAgain("%s is not a directory in lower layers", p)
			}
		}
	}
	if err := s.links(notes); err != nil {
		return err
	}
	if err := s.whiteouts(notes); err != nil {
		return err
	}
	if s.lower == nil {
		return nil
	}
	for p, unnamed := range implicit {
		if unnamed {
			if err := s.copyDirAttributes(p); err != nil {
				return fmt.Errorf("directory %s: %w", p, err)
			}
		}
	}
	return s.ctx.Err()
}

// copyDirAttributes gives a directory of the layer the owner, mode, times and attributes of the parents' directory.
func (s *settler) copyDirAttributes(p string) error {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY
	to, err := openAt(int(s.upper.Fd()), p, flags)
	if notFound(err) {
		return nil // the layer has removed it since
	}
	if err != nil {
		return err
	}
	defer to.Close()
	from, err := openAt(int(s.lower.Fd()), p, flags)
	if err != nil {
		return err
	}
	defer from.Close()
	return tree.CopyOpenAttributes(from, to)
}

// whiteouts removes the whiteouts that hide nothing: overlayfs would show them in a directory that no lower layer has.
func (s *settler) whiteouts(notes []note) error {
	for _, n := range notes {
		if n.kind != "whiteout" {
			continue
		}
		if typ, err := s.lowerKind(n.path); err != nil {
			return err
		} else if typ != 0 {
			continue
		}
		if typ, st, err := kindAt(s.upper, n.path); err != nil {
			return err
		} else if typ != unix.S_IFCHR || st.Rdev != 0 {
			continue
		}
		if err := s.keepingTimes(path.Dir(n.path), func(dir *os.File) error {
			return sys.Unlinkat(int(dir.Fd()), path.Base(n.path), 0)
		}); err != nil {
			return fmt.Errorf("whiteout %s: %w", n.path, err)
		}
	}
	return nil
}

// keepingTimes calls do with a directory of the layer, and restores its times afterwards.
func (s *settler) keepingTimes(p string, do func(dir *os.File) error) error {
	dir, err := openAt(int(s.upper.Fd()), p, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer dir.Close()
	var st unix.Stat_t
	if err := sys.Fstat(int(dir.Fd()), &st); err != nil {
		return err
	}
	if err := do(dir); err != nil {
		return err
	}
	return sys.UtimesNanoAt(int(dir.Fd()), "", []unix.Timespec{st.Atim, st.Mtim}, unix.AT_EMPTY_PATH)
}

// links makes hard links to files of lower layers, in place of the sockets that mark them. The target is copied to this
// layer, as overlayfs would do.
func (s *settler) links(notes []note) error {
	staged := map[string]string{} // by path: the copy of the file that is there at this point of the layer
	last := map[string]string{}   // by path: the copy that the link must finally lead to
	for i, n := range notes {
		if n.kind != "link" {
			continue
		}
		if err := s.ctx.Err(); err != nil {
			return err
		}
		copied, ok := staged[n.more]
		if !ok {
			copied = strconv.Itoa(i)
			switch typ, err := s.lowerKind(n.more); {
			case err != nil:
				return err
			case typ == 0:
				return applyAgain("hard link %s to %s, which lower layers don't have", n.path, n.more)
			case typ == unix.S_IFDIR:
				return applyAgain("hard link %s to %s, which is a directory", n.path, n.more)
			}
			if err := s.copyUp(n.more, copied); err != nil {
				return fmt.Errorf("hard link %s to %s: %w", n.path, n.more, err)
			}
			staged[n.more] = copied
		}
		staged[n.path] = copied
		last[n.path] = copied
	}
	for p, copied := range last {
		switch typ, _, err := kindAt(s.upper, p); {
		case err != nil:
			return err
		case typ != unix.S_IFSOCK:
			continue // a later entry has replaced it
		}
		if err := s.keepingTimes(path.Dir(p), func(dir *os.File) error {
			at, base := int(dir.Fd()), path.Base(p)
			if err := sys.Unlinkat(at, base, 0); err != nil {
				return err
			}
			return sys.Linkat(int(s.stage.Fd()), copied, at, base, 0)
		}); err != nil {
			return fmt.Errorf("hard link %s: %w", p, err)
		}
	}
	return nil
}

// copyUp copies a file of lower layers to the scratch directory. If lower layers show through at its own path, the copy
// is linked there too.
func (s *settler) copyUp(p, copied string) error {
	from, err := openAt(int(s.lower.Fd()), path.Dir(p), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer from.Close()
	if err := tree.CopyEntry(s.ctx, from, path.Base(p), s.stage, copied); err != nil {
		return err
	}
	names := strings.Split(p, "/")
	for i, name := range names {
		at := path.Join(names[:i]...)
		if at == "" {
			at = "."
		}
		here := path.Join(at, name)
		typ, _, err := kindAt(s.upper, here)
		switch {
		case err != nil:
			return err
		case typ == unix.S_IFDIR && i < len(names)-1:
			if opaque, err := s.isOpaque(here); err != nil || opaque {
				return err
			}
			continue
		case typ != 0:
			return nil
		}
		if err := s.keepingTimes(at, func(dir *os.File) error {
			if i == len(names)-1 {
				return sys.Linkat(int(s.stage.Fd()), copied, int(dir.Fd()), name, 0)
			}
			if err := sys.Mkdirat(int(dir.Fd()), name, 0o700); err != nil {
				return err
			}
			return s.copyDirAttributes(here)
		}); err != nil {
			return err
		}
	}
	return nil
}

func (s *settler) isOpaque(p string) (bool, error) {
	dir, err := openAt(int(s.upper.Fd()), p, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return false, err
	}
	defer dir.Close()
	for _, name := range []string{"trusted.overlay.opaque", "user.overlay.opaque"} {
		b := make([]byte, 8)
		n, err := unix.Fgetxattr(int(dir.Fd()), name, b)
		if err == nil && string(b[:n]) == "y" {
			return true, nil
		}
	}
	return false, nil
}
