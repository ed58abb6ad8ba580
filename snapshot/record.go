package snapshot

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"distkit/disk"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The store of one driver is <root>/snapshots/<driver>/:
//
//	state         layout version, boot ID, next id; the lock for changing any of these names
//	<id>/info     record of a snapshot; <id> appears when it is complete
//	<id>/fs       files of the snapshot
//	keys/<hash>   symlink to ../<id>: where the record of a key may be, checked against that record
//	tmp/<random>  work in progress and removed snapshots, locked by the process at work
//	sample/       files that show whether the store is a copy that has lost properties of files
//
// The records are authoritative. keys/ is only an index and is not synced. The first process after each boot rebuilds
// it, since only a power failure can damage it.

// layoutVersion is the first word of state. A store of another version is refused.
const layoutVersion = "1"

// record is the content of <id>/info.
type record struct {
	Namespace string `json:"namespace,omitempty"` // empty for a snapshot that all namespaces share
	Info
	Parents []uint64 `json:"parents,omitempty"` // ids of all ancestors, nearest first
}

// entry is a record as read from disk.
type entry struct {
	id  uint64
	raw []byte
	record
}

func (s *Snapshotter) dirOf(id uint64) string {
	return filepath.Join(s.dir, strconv.FormatUint(id, 10))
}

func (s *Snapshotter) tree(id uint64, r record) Tree {
	t := Tree{Dir: s.dirOf(id), Kind: r.Kind, Parents: make([]string, len(r.Parents))}
	for i, p := range r.Parents {
		t.Parents[i] = s.dirOf(p)
	}
	return t
}

// maxRecord bounds the size of a record. One with 500 parents and a hundred labels is far smaller.
const maxRecord = 4 << 20

// step is called between the steps of every change. Crash tests replace it to kill the process there.
var step = func(string) {}

func keyFile(namespace, key string) string {
	sum := sha256.Sum256([]byte(namespace + "\x00" + key))
	return hex.EncodeToString(sum[:])
}

// read returns the record of an id. If there is none, the error wraps fs.ErrNotExist.
func (s *Snapshotter) read(id uint64) (entry, error) {
	e := entry{id: id}
	var err error
	if e.raw, err = s.files.ReadFile(strconv.FormatUint(id, 10)+"/info", maxRecord); err == nil {
		err = json.Unmarshal(e.raw, &e.record)
	} else if !errdefs.IsFailedPrecondition(err) { // otherwise the file was never a record
		return e, err
	}
	if err != nil {
		return e, errdefs.ErrDataLoss.WithMessage(fmt.Sprintf("record of snapshot %d is damaged: %v", id, disk.Cause(err)))
	}
	return e, nil
}

// lookup finds a snapshot by key in this namespace, or else a shared one.
func (s *Snapshotter) lookup(key string) (entry, error) {
	e, err := s.lookupIn(s.namespace, key)
	if errors.Is(err, fs.ErrNotExist) && isDigest(key) {
		e, err = s.lookupIn("", key)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return e, errdefs.ErrNotFound.WithMessage("no such snapshot")
	}
	return e, err
}

func (s *Snapshotter) lookupIn(namespace, key string) (entry, error) {
	to, err := os.Readlink(filepath.Join(s.dir, "keys", keyFile(namespace, key)))
	if err != nil {
		return entry{}, err
	}
	id, err := strconv.ParseUint(strings.TrimPrefix(to, "../"), 10, 64)
	if err != nil {
		return entry{}, fs.ErrNotExist
	}
	e, err := s.read(id)
	if err == nil && (e.Key != key || e.Namespace != namespace) {
		err = fs.ErrNotExist
	}
	return e, err
}

// entries returns the records of all namespaces, by ascending id. It skips damaged records, and reports them with a
// DataLoss error beside the list.
func (s *Snapshotter) entries() ([]entry, error) {
	ids, err := s.ids()
	if err != nil {
		return nil, err
	}
	all := make([]entry, 0, len(ids))
	var damaged []error
	for _, id := range ids {
		e, err := s.read(id)
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed by another process
		case errdefs.IsDataLoss(err):
			damaged = append(damaged, err)
		case err != nil:
			return nil, err
		default:
			all = append(all, e)
		}
	}
	return all, errors.Join(damaged...)
}

func (s *Snapshotter) ids() ([]uint64, error) {
	d, err := s.files.OpenDir(".")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", s.dir, err)
	}
	var ids []uint64
	for _, n := range names {
		if id, err := strconv.ParseUint(n, 10, 64); err == nil {
			ids = append(ids, id)
		}
	}
	sort.Slice(ids, func(i, j int) bool { return ids[i] < ids[j] })
	return ids, nil
}

// lock is the store's lock. It is held only while names are changed.
type lock struct {
	f    *os.File
	next uint64
}

func (s *Snapshotter) lock(ctx context.Context) (*lock, error) {
	if err := s.checkDirs(); err != nil {
		return nil, fmt.Errorf("lock store: %w", err)
	}
	f, err := s.files.LockFile(ctx, "state", os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
	if errors.Is(err, fs.ErrNotExist) {
		if err := s.create(ctx); err != nil {
			return nil, err
		}
		f, err = s.files.LockFile(ctx, "state", os.O_RDWR|os.O_CREATE, 0o600, unix.LOCK_EX)
	}
	if err != nil {
		return nil, fmt.Errorf("lock store: %w", err)
	}
	l := &lock{f: f}
	boot, next, err := parseState(f)
	if err == nil {
		l.next = next
		if boot != bootID() || next == 0 {
			err = s.recover(ctx, l)
		}
	}
	if err != nil {
		l.unlock()
		return nil, err
	}
	return l, nil
}

func (l *lock) unlock() { disk.Release(l.f) }

// nextID returns the next id. Ids are never reused, so a mount that outlives its snapshot is not mistaken for another's.
func (l *lock) nextID() (uint64, error) {
	id := l.next
	l.next++
	return id, l.save()
}

func (l *lock) save() error {
	// always of the same length, so that it overwrites the old state completely
	_, err := fmt.Fprintf(offsetWriter{l.f}, "%s %-36s %20d\n", layoutVersion, bootID(), l.next)
	return err
}

type offsetWriter struct{ f *os.File }

func (w offsetWriter) Write(b []byte) (int, error) { return w.f.WriteAt(b, 0) }

// parseState parses state. An empty or torn file, as after a power failure, counts as that of another boot.
func parseState(f *os.File) (boot string, next uint64, err error) {
	b := make([]byte, 128)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return "", 0, err
	}
	w := strings.Fields(strings.Trim(string(b[:n]), "\x00"))
	if len(w) == 0 {
		return "", 0, nil
	}
	if w[0] != layoutVersion {
		return "", 0, errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(
			"%s: layout version %.20q is unknown to this program, which knows %s", f.Name(), w[0], layoutVersion))
	}
	if len(w) == 3 {
		next, _ = strconv.ParseUint(w[2], 10, 64)
		boot = w[1]
	}
	return boot, next, nil
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "-"
	}
	return strings.TrimSpace(string(b))
}

// checkDirs refuses a store whose directories are symbolic links, since these would lead changes out of the store.
func (s *Snapshotter) checkDirs() error {
	root := disk.Tree(filepath.Dir(filepath.Dir(s.dir)))
	dir := filepath.Join("snapshots", s.driver.Name())
	for _, name := range []string{dir, filepath.Join(dir, "keys"), filepath.Join(dir, "tmp"), filepath.Join(dir, "locks")} {
		d, err := root.OpenDir(name)
		if err == nil {
			err = d.Close()
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// create makes the store's directories. Only their owner may enter them: root filesystems contain set-user-ID programs.
func (s *Snapshotter) create(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Dir(s.dir), 0o755); err != nil {
		return fmt.Errorf("create store: %w", err)
	}
	for _, d := range []string{s.dir, filepath.Join(s.dir, "keys"), filepath.Join(s.dir, "tmp")} {
		if err := os.Mkdir(d, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("create store: %w", err)
		}
	}
	if _, err := os.Lstat(filepath.Join(s.dir, "state")); err == nil {
		return nil
	}
	if err := s.makeSample(ctx); err != nil {
		return fmt.Errorf("create store: %w", err)
	}
	return s.driver.Init(s.dir)
}

// recover rebuilds the index from the records. It runs in the first locked call after a boot.
func (s *Snapshotter) recover(ctx context.Context, l *lock) error {
	if err := s.create(ctx); err != nil {
		return err
	}
	ids, err := s.ids()
	if err != nil {
		return err
	}
	keys := filepath.Join(s.dir, "keys")
	index := map[string]string{}
	l.next = max(l.next, 1)
	for _, id := range ids {
		l.next = max(l.next, id+1)
		e, err := s.read(id)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errdefs.IsDataLoss(err) {
			return err
		}
		if err != nil {
			// A directory without a record can't be used by any key. The snapshot was not committed when the power
			// failed.
			if err := os.Rename(s.dirOf(id), filepath.Join(s.dir, "tmp", strconv.FormatUint(id, 10))); err != nil {
				return err
			}
			continue
		}
		index[keyFile(e.Namespace, e.Key)] = "../" + strconv.FormatUint(id, 10)
	}
	names, err := os.ReadDir(keys)
	if err != nil {
		return err
	}
	for _, n := range names {
		name := filepath.Join(keys, n.Name())
		if to, err := os.Readlink(name); err == nil && index[n.Name()] == to {
			delete(index, n.Name())
		} else if err == nil {
			_ = os.Remove(name)
		}
	}
	for name, to := range index {
		if err := os.Symlink(to, filepath.Join(keys, name)); err != nil {
			return err
		}
	}
	step("recovered")
	return l.save()
}

// index maps a key to an id. It replaces what a killed process may have left for the key.
func (s *Snapshotter) index(namespace, key string, id uint64) error {
	name := filepath.Join(s.dir, "keys", keyFile(namespace, key))
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Symlink("../"+strconv.FormatUint(id, 10), name)
}

func (s *Snapshotter) unindex(namespace, key string) {
	_ = os.Remove(filepath.Join(s.dir, "keys", keyFile(namespace, key)))
}

// lockFile opens and locks a file or directory of the store, and checks that it still has that name.
func lockFile(ctx context.Context, name string, flag, how int) (*os.File, error) {
	return disk.LockFile(ctx, name, flag|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600, how)
}

// scratch makes a directory in tmp/. The directory is locked, so that sweep leaves it alone. scratch sweeps first.
func (s *Snapshotter) scratch(ctx context.Context) (string, *os.File, error) {
	_ = s.sweep(ctx)
	for {
		dir, err := os.MkdirTemp(filepath.Join(s.dir, "tmp"), "")
		if errors.Is(err, fs.ErrNotExist) {
			if err = s.create(ctx); err == nil {
				continue
			}
		}
		if err != nil {
			return "", nil, err
		}
		step("scratch made")
		f, err := lockFile(context.Background(), dir, unix.O_DIRECTORY, unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EWOULDBLOCK) {
			continue // another process swept it between the two calls
		}
		return dir, f, err
	}
}

// sweep deletes the directories in tmp/ that killed processes have left. It needs no lock on the store: directories in
// use are locked themselves. The error lists what can't be deleted.
func (s *Snapshotter) sweep(ctx context.Context) error {
	tmp := filepath.Join(s.dir, "tmp")
	d, err := os.Open(tmp)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	left := []error{err}
	for _, n := range names {
		dir := filepath.Join(tmp, n)
		f, err := lockFile(context.Background(), dir, unix.O_DIRECTORY, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			left = append(left, ofOthers(s.removeFiles(ctx, dir)))
			disk.Release(f)
		} else if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.ELOOP) {
			left = append(left, ofOthers(err))
		}
	}
	return errors.Join(left...)
}

// encode formats a record as in its file.
func encode(r record) []byte {
	b, err := json.Marshal(r)
	if err != nil {
		panic(err) // can't happen: strings and times, all validated
	}
	return append(b, '\n')
}

func (s *Snapshotter) syncDir(dirs ...string) error {
	if s.noSync {
		return nil
	}
	for _, dir := range dirs {
		if err := disk.SyncDir(dir); err != nil {
			return fmt.Errorf("sync %s: %w", dir, err)
		}
	}
	return nil
}

func now() time.Time { return time.Now().UTC() }
