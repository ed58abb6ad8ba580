package content

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Status describes an ingest, whether a process is writing it or it was left behind.
type Status struct {
	Ref       string // as given by the last writer
	Offset    int64  // number of bytes stored
	Total     int64  // expected size in bytes; 0 if unknown
	Expected  digest.Digest
	StartedAt time.Time
	UpdatedAt time.Time
	Active    bool // whether a writer has it open
}

// Files of an ingest directory (distkit-layout(5), INGESTS).
const (
	lockFile     = "lock"
	refFile      = "ref"
	totalFile    = "total"
	expectedFile = "expected"
	startedFile  = "startedat"
	stateFile    = "state"
	dataFile     = "data"
	linkFile     = "link"
)

// ingestFiles lists the files of an ingest in the order of removal. The lock goes last, so that no process starts in a
// directory that is being removed. updatedat is no longer written.
var ingestFiles = []string{dataFile, linkFile, stateFile, stateFile + ".tmp", "updatedat", startedFile, expectedFile, totalFile, refFile, lockFile}

// maxRef bounds the length of a ref in bytes.
const maxRef = 4 << 10

// checkRef returns InvalidArgument if a string can't be a ref.
func checkRef(ref string) error {
	switch {
	case ref == "":
		return errclass.Errorf(errdefs.ErrInvalidArgument, "ref is empty")
	case len(ref) > maxRef:
		return errclass.Errorf(errdefs.ErrInvalidArgument, "ref %.40q… is longer than %d bytes", ref, maxRef)
	case strings.ContainsFunc(ref, unicode.IsControl) || !utf8.ValidString(ref):
		return errclass.Errorf(errdefs.ErrInvalidArgument, "ref %.40q has control characters or is not UTF-8", ref)
	}
	return nil
}

// ingestDir returns the directory, relative to the store, of the ingest for a key: a ref or a digest.
func ingestDir(key string) string {
	sum := sha256.Sum256([]byte(key))
	return path.Join(layout.Ingest, hex.EncodeToString(sum[:]))
}

// lockIngest locks an ingest, and creates its directory if it doesn't exist. Unavailable if another process holds the
// lock and wait is false.
func (s *Store) lockIngest(ctx context.Context, dir string, wait bool) (*os.File, error) {
	how := unix.LOCK_EX
	if !wait {
		how |= unix.LOCK_NB
	}
	name := path.Join(dir, lockFile)
	return s.Tree.LockOpened(ctx, name, how, func() (*os.File, error) {
		for {
			if err := s.Tree.Mkdir(dir, 0o777); errors.Is(err, fs.ErrNotExist) {
				if err := s.Tree.MakeDir(path.Dir(dir)); err != nil {
					return nil, err
				}
				continue
			} else if err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, err
			}
			f, err := s.Tree.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o666)
			if !errors.Is(err, fs.ErrNotExist) { // else the directory was just removed by another process
				return f, err
			}
		}
	})
}

// locked reports whether another process has an exclusive lock on an open file.
func locked(f *os.File) bool {
	err := disk.Lock(f, unix.LOCK_SH|unix.LOCK_NB)
	if err == nil {
		disk.Unlock(f)
	}
	return errors.Is(err, unix.EWOULDBLOCK)
}

// removeIngest removes the files of an ingest whose lock the caller holds, releases the lock and removes the directory.
// Unknown files stay, and so does the directory then. files are open files of the ingest, which removeIngest closes.
func (s *Store) removeIngest(dir string, lock *os.File, files ...*os.File) error {
	var err error
	for _, name := range ingestFiles {
		if err = s.discard(path.Join(dir, name)); err != nil {
			break
		}
	}
	// NFS keeps a removed file in its directory until it is closed.
	for _, f := range append(files, lock) {
		disk.Release(f)
	}
	if err != nil {
		return err
	}
	if err := s.Tree.RemoveDir(dir); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// reap removes the ingest of a blob that is stored, in case the process that committed it died before it could.
func (s *Store) reap(ctx context.Context, dir string) {
	if _, err := s.Tree.Stat(dir); err != nil {
		return
	}
	if lock, err := s.lockIngest(ctx, dir, false); err == nil {
		_ = s.removeIngest(dir, lock)
	}
}

// readIngest reads the description of an ingest. Missing or torn fields count as unknown. NotFound if the directory
// lacks a ref or data.
func (s *Store) readIngest(dir string) (Status, error) {
	st := Status{Ref: s.readWord(dir, refFile)}
	if checkRef(st.Ref) != nil { // a new directory, or a torn one
		return Status{}, errNoIngest()
	}
	name := path.Join(dir, dataFile)
	data, err := s.Tree.Open(name)
	if err == nil {
		st.Active = locked(data)
		_ = data.Close()
	}
	var fi fs.FileInfo
	if err == nil || errors.Is(err, fs.ErrPermission) { // ErrPermission: only the owner may read it
		fi, err = s.Tree.Stat(name)
	}
	if errors.Is(err, fs.ErrNotExist) || errdefs.IsFailedPrecondition(err) {
		return Status{}, errNoIngest()
	}
	if err != nil {
		return Status{}, err
	}
	st.Offset, st.UpdatedAt = fi.Size(), fi.ModTime()
	st.Total, _ = strconv.ParseInt(s.readWord(dir, totalFile), 10, 64)
	if d := digest.Digest(s.readWord(dir, expectedFile)); Validate(d) == nil {
		st.Expected = d
	}
	st.StartedAt, err = time.Parse(time.RFC3339Nano, s.readWord(dir, startedFile))
	if err != nil {
		st.StartedAt = st.UpdatedAt
	}
	return st, nil
}

func errNoIngest() error { return errclass.Errorf(errdefs.ErrNotFound, "no such ingest") }

// readWord reads a file of one line; "" if it doesn't exist.
func (s *Store) readWord(dir, name string) string {
	b, err := s.Tree.ReadFile(path.Join(dir, name), 2*maxRef)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

// eachIngest calls f with each ingest and its directory.
func (s *Store) eachIngest(ctx context.Context, f func(dir string, st Status) error) error {
	return s.eachEntry(ctx, layout.Ingest, func(e fs.DirEntry) error {
		if !e.IsDir() || !valid(digest.SHA256, e.Name()) {
			return nil
		}
		dir := path.Join(layout.Ingest, e.Name())
		st, err := s.readIngest(dir)
		if errdefs.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("list ingests: %w", err)
		}
		return f(dir, st)
	})
}

// eachMatching calls f with each ingest that matches ref: the one whose key is ref, else all whose ref or expected
// digest is ref. NotFound if no ingest matches, InvalidArgument if ref is not valid.
func (s *Store) eachMatching(ctx context.Context, ref string, f func(dir string, st Status) error) error {
	if err := checkRef(ref); err != nil {
		return err
	}
	dir := ingestDir(ref)
	if st, err := s.readIngest(dir); err == nil {
		return f(dir, st)
	} else if !errdefs.IsNotFound(err) {
		return fmt.Errorf("ingest %s: %w", ref, err)
	}
	found := false
	err := s.eachIngest(ctx, func(dir string, st Status) error {
		if st.Ref != ref && string(st.Expected) != ref {
			return nil
		}
		found = true
		return f(dir, st)
	})
	if err == nil && !found {
		err = errclass.Errorf(errdefs.ErrNotFound, "ingest %s: not found", ref)
	}
	return err
}

// Status describes the ingest with the given ref or expected digest; NotFound if there is none. It prefers an active
// one.
func (s *Store) Status(ctx context.Context, ref string) (Status, error) {
	var first *Status
	err := s.eachMatching(ctx, ref, func(_ string, st Status) error {
		if first == nil || st.Active && !first.Active {
			first = &st
		}
		return nil
	})
	if err != nil {
		return Status{}, err
	}
	return *first, nil
}

// ListStatuses describes all ingests, the oldest first.
func (s *Store) ListStatuses(ctx context.Context) ([]Status, error) {
	var list []Status
	err := s.eachIngest(ctx, func(_ string, st Status) error {
		list = append(list, st)
		return nil
	})
	slices.SortFunc(list, func(a, b Status) int {
		if c := a.StartedAt.Compare(b.StartedAt); c != 0 {
			return c
		}
		return strings.Compare(a.Ref, b.Ref)
	})
	return list, err
}

// Abort removes the ingests with the given ref or expected digest. NotFound if there is none, Unavailable if a writer
// has one open.
func (s *Store) Abort(ctx context.Context, ref string) error {
	return s.eachMatching(ctx, ref, func(dir string, _ Status) error {
		lock, err := s.lockIngest(ctx, dir, false)
		if err == nil {
			err = s.removeIngest(dir, lock)
		}
		if err != nil {
			return fmt.Errorf("abort %s: %w", ref, err)
		}
		return nil
	})
}

// Offset returns how many bytes of a blob an ingest has stored. It takes a single stat, for progress displays. It is 0
// if there is no ingest, also if the blob is stored already.
func (s *Store) Offset(expected digest.Digest) int64 {
	fi, err := s.Tree.Stat(path.Join(ingestDir(string(expected)), dataFile))
	if err != nil || !fi.Mode().IsRegular() {
		return 0
	}
	return fi.Size()
}
