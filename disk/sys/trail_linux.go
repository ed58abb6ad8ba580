package sys

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// A Trail walks a tree of untrusted content. It is the list of directories from the top of the tree down to the current
// one. It follows no symbolic link, and enters no other mount: ErrMounted. At most maxDepth directories are open and a
// few names of each are in memory, whatever the tree's size. Errors are of type *os.PathError.
type Trail []level

type level struct {
	fd       int // -1 if it was closed to bound the number of open files
	dev, ino uint64
	next     int64    // the position in the directory after names
	names    []string // read from the directory, but not yet returned by Next
}

// listed is how many bytes of directory entries are read at a time.
const listed = 8 << 10

// NewTrail opens a directory as the top of a tree. name is relative to the directory dir, or a path if dir is AT_FDCWD.
// A symbolic link is not followed.
func NewTrail(dir int, name string) (Trail, error) {
	fd, err := Openat(dir, name, OpenDir, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	var t Trail
	err = t.add(name, fd)
	return t, err
}

func (t *Trail) add(name string, fd int) error {
	var st unix.Stat_t
	if err := Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return &os.PathError{Op: "stat", Path: name, Err: err}
	}
	*t = append(*t, level{fd: fd, dev: st.Dev, ino: st.Ino})
	if n := len(*t) - 1 - maxDepth; n >= 0 {
		_ = unix.Close((*t)[n].fd)
		(*t)[n].fd = -1
	}
	return nil
}

func (t Trail) last() *level { return &t[len(t)-1] }

// FD returns the descriptor of the current directory.
func (t Trail) FD() int { return t.last().fd }

// Next returns another name in the current directory, or "" after the last one.
func (t Trail) Next() (string, error) {
	l := t.last()
	if len(l.names) == 0 {
		if err := l.list(); err != nil {
			return "", &os.PathError{Op: "list", Path: ".", Err: err}
		}
		if len(l.names) == 0 {
			return "", nil
		}
	}
	name := l.names[0]
	l.names = l.names[1:]
	return name, nil
}

func (l *level) list() error {
	// The directory may have been closed and opened again since the last read.
	if err := retry(func() error { _, err := unix.Seek(l.fd, l.next, unix.SEEK_SET); return err }); err != nil {
		return err
	}
	var err error
	if l.names, err = readNames(l.fd, make([]byte, listed), nil); err != nil || len(l.names) == 0 {
		return err
	}
	return retry(func() (err error) { l.next, err = unix.Seek(l.fd, 0, unix.SEEK_CUR); return err })
}

// Down enters a directory in the current one.
func (t *Trail) Down(name string) error {
	fd, err := OpenBeneath(t.FD(), name, OpenDir, unix.RESOLVE_NO_XDEV)
	if errors.Is(err, unix.EXDEV) {
		err = ErrMounted
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	return t.add(name, fd)
}

// Up leaves the current directory for its parent, which is opened again as ".." if it was closed. After Up from the top
// the trail is empty.
func (t *Trail) Up() error {
	from := t.FD()
	defer unix.Close(from)
	*t = (*t)[:len(*t)-1]
	if len(*t) == 0 || t.FD() >= 0 {
		return nil
	}
	fd, err := Openat(from, "..", OpenDir, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "..", Err: err}
	}
	l := t.last()
	l.fd = fd
	var st unix.Stat_t
	if err := Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: "..", Err: err}
	}
	if st.Dev != l.dev || st.Ino != l.ino {
		return &os.PathError{Op: "open", Path: "..", Err: errors.New("another process moved the directory")}
	}
	return nil
}

// Close closes the open directories.
func (t Trail) Close() {
	for _, l := range t {
		if l.fd >= 0 {
			_ = unix.Close(l.fd)
		}
	}
}
