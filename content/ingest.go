package content

import (
	"cmp"
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

// Files of an ingest directory: distkit-layout(5), INGESTS.
const (
	lockFile     = "lock"
	refFile      = "ref"
	totalFile    = "total"
	expectedFile = "expected"
	startedFile  = "startedat"
	updatedFile  = "updatedat"
	stateFile    = "state"
	dataFile     = "data"
	linkFile     = "link"
)

// known lists them in the order in which they are removed: the lock last, so that nobody
// else begins in a directory that is going away.
var known = []string{dataFile, linkFile, stateFile, stateFile + ".tmp", updatedFile, startedFile, expectedFile, totalFile, refFile, lockFile}

const maxRef = 4 << 10

func checkRef(ref string) error {
	switch {
	case ref == "":
		return errclass.As(errors.New("ref is empty"), errdefs.ErrInvalidArgument)
	case len(ref) > maxRef:
		return errclass.As(fmt.Errorf("ref %.40q… is longer than %d bytes", ref, maxRef), errdefs.ErrInvalidArgument)
	case strings.ContainsFunc(ref, unicode.IsControl) || !utf8.ValidString(ref):
		return errclass.As(fmt.Errorf("ref %.40q holds control characters or what is not UTF-8", ref), errdefs.ErrInvalidArgument)
	}
	return nil
}

// ingestDir is where an ingest of that key lives: the key is a ref, or a digest. Like all
// directories of ingests here it is a name in the store's tree.
func ingestDir(key string) string {
	sum := sha256.Sum256([]byte(key))
	return path.Join(layout.Ingest, hex.EncodeToString(sum[:]))
}

// lockIngest creates the directory if need be and locks it: Unavailable if somebody else
// has it and wait is false.
func (s *Store) lockIngest(ctx context.Context, dir string, wait bool) (*os.File, error) {
	for {
		if err := s.Tree.Mkdir(dir, 0o777); errors.Is(err, fs.ErrNotExist) {
			if err := s.Tree.MakeDir(path.Dir(dir)); err != nil {
				return nil, err
			}
			continue
		} else if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		f, err := s.Tree.OpenFile(path.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o666)
		if errors.Is(err, fs.ErrNotExist) {
			continue // its last owner has just removed the directory
		}
		if err != nil {
			return nil, err
		}
		how := unix.LOCK_EX
		if !wait {
			how |= unix.LOCK_NB
		}
		if err := disk.LockContext(ctx, f, how); err != nil {
			return nil, err
		}
		if s.Tree.Names(path.Join(dir, lockFile), f) {
			return f, nil
		}
		_ = f.Close() // locked what its owner has removed meanwhile
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
}

// locked tells whether somebody holds f's lock, without keeping it.
func locked(f *os.File) bool {
	err := disk.Lock(f, unix.LOCK_SH|unix.LOCK_NB)
	if err == nil {
		disk.Unlock(f)
	}
	return errors.Is(err, unix.EWOULDBLOCK)
}

// removeIngest empties a directory whose lock is held, gives the lock back and removes the directory. Files that
// are not known stay, and the directory with them. The files given are its own, and closed.
func (s *Store) removeIngest(dir string, lock *os.File, files ...*os.File) error {
	var err error
	for _, name := range known {
		if err = s.Tree.Remove(path.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		if err != nil {
			break
		}
	}
	// NFS keeps a file that was removed in its directory until it is closed.
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

// A WriterOption changes how [Store.Writer] opens an ingest.
type WriterOption int

// Wait lets Writer wait, until the context is done, for another writer of the same ingest. That
// one has mostly stored the blob by then: AlreadyExists.
const Wait WriterOption = 1

// Writer locks an ingest and opens or resumes it, in one atomic step. The ingest is that of the
// digest if one is expected, whatever the ref, so that a blob is stored once; else it is that of
// the ref. A status shows the ref. Commit verifies the digest and a size above 0.
//
// Unavailable: another writer has the ingest. AlreadyExists: the expected blob is there, and
// has been freshened. DataLoss: it is there, not damaged, and has another size. InvalidArgument: the ref is
// empty, longer than 4 KiB, not UTF-8 or with control characters.
func (s *Store) Writer(ctx context.Context, ref string, size int64, expected digest.Digest, options ...WriterOption) (*Writer, error) {
	if err := checkRef(ref); err != nil {
		return nil, err
	}
	dir := ingestDir(ref)
	if expected != "" {
		if err := Validate(expected); err != nil {
			return nil, err
		}
		dir = ingestDir(string(expected))
	}
	if size <= 0 {
		size = anySize
	}
	found, err := s.stored(ctx, expected, size)
	if err != nil {
		return nil, err
	}
	if found {
		s.reap(ctx, dir)
		return nil, errExists(expected)
	}
	if err := s.checkSize(ctx, expected, size); err != nil {
		return nil, err
	}
	if err := s.Init(); err != nil {
		return nil, err
	}
	lock, err := s.lockIngest(ctx, dir, slices.Contains(options, Wait))
	if err != nil {
		return nil, fmt.Errorf("ingest %s: %w", ref, err)
	}
	// The writer that was waited for may have stored it.
	if found, err = s.stored(ctx, expected, size); err != nil || found {
		_ = s.removeIngest(dir, lock)
		return nil, cmp.Or(err, errExists(expected))
	}
	w := &Writer{s: s, dir: dir, lock: lock, ref: ref, total: max(size, 0), expected: expected}
	if err := w.open(ctx); err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("ingest %s: %w", ref, err)
	}
	return w, nil
}

// anySize is the size of a blob whose size is not known.
const anySize = -1

// stored reports whether the store, or an alternate, has a blob of a size: one of another size is damaged. Whoever is told so
// may rely on it: the blob is freshened, and on disk.
func (s *Store) stored(ctx context.Context, dgst digest.Digest, size int64) (bool, error) {
	if dgst == "" {
		return false, nil
	}
	tree, fi, err := s.lookup(dgst)
	switch {
	case errdefs.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, err
	case size != anySize && fi.Size() != size:
		return false, nil
	case tree != s.Tree:
		return true, nil
	}
	err = s.Retain(ctx, dgst)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // deleted in between
	}
	if err != nil {
		return false, blobError(dgst, err)
	}
	return true, nil
}

// maxDoubt bounds how much larger than expected a blob may be so that it is hashed to find out which of both is wrong.
const maxDoubt = 1 << 30

// checkSize is DataLoss if the expected size is not that of the blob, which is stored and not damaged.
func (s *Store) checkSize(ctx context.Context, dgst digest.Digest, size int64) error {
	if dgst == "" || size == anySize {
		return nil
	}
	f, err := s.File(dgst)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if f.Size() == size || f.Size()-size > maxDoubt {
		return nil
	}
	err = verifyFile(ctx, dgst, f.File, f.Size())
	if errdefs.IsDataLoss(err) {
		return nil
	}
	if err == nil {
		err = mismatch(fmt.Errorf("blob %s: size mismatch: stored are %d bytes, expected %d", dgst, f.Size(), size))
	}
	return err
}

func errExists(dgst digest.Digest) error {
	return errclass.Errorf(errdefs.ErrAlreadyExists, "blob %s: already exists", dgst)
}

// reap removes the ingest of a blob that is stored: its commit was killed, or has yet to remove it.
func (s *Store) reap(ctx context.Context, dir string) {
	if _, err := s.Tree.Stat(dir); err != nil {
		return
	}
	if lock, err := s.lockIngest(ctx, dir, false); err == nil {
		_ = s.removeIngest(dir, lock)
	}
}

// readIngest reads what a directory says of its ingest. What is missing or torn reads as
// not known; without a ref or data it is none: NotFound.
func (s *Store) readIngest(dir string) (Status, error) {
	var st Status
	st.Ref = s.readWord(dir, refFile)
	data, err := s.Tree.Open(path.Join(dir, dataFile))
	if errors.Is(err, fs.ErrPermission) {
		// Readable to its owner alone: what stat tells is enough.
		var fi fs.FileInfo
		if fi, err = s.Tree.Stat(path.Join(dir, dataFile)); err == nil {
			st.Offset, st.UpdatedAt = fi.Size(), fi.ModTime()
		}
	} else if err == nil {
		defer data.Close()
		var fi fs.FileInfo
		if fi, err = data.Stat(); err == nil {
			st.Offset, st.UpdatedAt = fi.Size(), fi.ModTime()
			st.Active = locked(data)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errdefs.IsFailedPrecondition(err) {
		return Status{}, err
	}
	if err != nil || checkRef(st.Ref) != nil {
		return Status{}, errclass.As(errors.New("no such ingest"), errdefs.ErrNotFound)
	}
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

// readWord reads a file of one line; empty if it isn't there.
func (s *Store) readWord(dir, name string) string {
	b, err := s.Tree.ReadFile(path.Join(dir, name), 2*maxRef)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

// ingests calls f with every ingest and its directory.
func (s *Store) ingests(ctx context.Context, f func(dir string, st Status) error) error {
	root, err := s.Tree.OpenDir(layout.Ingest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list ingests: %w", err)
	}
	defer root.Close()
	return readNames(ctx, root, func(e fs.DirEntry) error {
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

// find calls f with every ingest that ref means: the one of that key, else all that show the
// ref or expect that digest. NotFound if there is none, InvalidArgument if it can be no ref.
func (s *Store) find(ctx context.Context, ref string, f func(dir string, st Status) error) error {
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
	err := s.ingests(ctx, func(dir string, st Status) error {
		if st.Ref != ref && string(st.Expected) != ref {
			return nil
		}
		found = true
		return f(dir, st)
	})
	if err == nil && !found {
		err = errclass.As(fmt.Errorf("ingest %s: not found", ref), errdefs.ErrNotFound)
	}
	return err
}

// Status describes the ingest of a ref, or of a digest; NotFound if there is none.
func (s *Store) Status(ctx context.Context, ref string) (Status, error) {
	var first *Status
	err := s.find(ctx, ref, func(_ string, st Status) error {
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

// ListStatuses describes every ingest, the oldest first.
func (s *Store) ListStatuses(ctx context.Context) ([]Status, error) {
	var list []Status
	err := s.ingests(ctx, func(_ string, st Status) error {
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

// Abort throws away what is stored of the ingests that show a ref, or expect a digest.
// NotFound if there is none, Unavailable if a writer has one open: it takes the lock first.
func (s *Store) Abort(ctx context.Context, ref string) error {
	return s.find(ctx, ref, func(dir string, _ Status) error {
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

// Offset is how much of a blob an ingest has stored: one stat, for progress displays. 0 if
// there is none, also where the blob is stored already.
func (s *Store) Offset(expected digest.Digest) int64 {
	fi, err := s.Tree.Stat(path.Join(ingestDir(string(expected)), dataFile))
	if err != nil || !fi.Mode().IsRegular() {
		return 0
	}
	return fi.Size()
}
