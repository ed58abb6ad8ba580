package layout

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"distkit/disk"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// locks is the directory of files that are there for their locks alone: distkit-layout(5), FILES.
const locks = "locks"

// openLock opens a file that is there for its lock, and creates it if need be. One that this user may not write to, such as
// another user's, or one on a read-only mount, is opened for reading.
func openLock(tree disk.Tree, name string) (*os.File, error) {
	f, err := tree.OpenLock(name, os.O_CREATE, 0o666)
	if dir := path.Dir(name); errors.Is(err, fs.ErrNotExist) && dir != "." {
		if err := tree.Mkdir(dir, 0o777); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		if d, err := tree.OpenDir(dir); err == nil {
			giveAway(tree, d)
			_ = d.Close()
		}
		f, err = tree.OpenLock(name, os.O_CREATE, 0o666)
	}
	if err == nil {
		giveAway(tree, f)
	}
	return f, err
}

// giveAway gives a file that root has made in another user's store to that user, who must be able to write to it.
func giveAway(tree disk.Tree, f *os.File) {
	if os.Geteuid() != 0 {
		return
	}
	var of, is unix.Stat_t
	if unix.Fstat(int(f.Fd()), &is) == nil && is.Uid == 0 && unix.Stat(string(tree), &of) == nil && of.Uid != 0 {
		_ = f.Chown(int(of.Uid), int(of.Gid)) // where it can't be, the user locks it without writing to it
	}
}

// lockFile locks one of the files in locks. how is as for [disk.Lock].
func lockFile(ctx context.Context, tree disk.Tree, name string, how int) (*os.File, error) {
	name = path.Join(locks, name)
	return tree.LockOpened(ctx, name, how, func() (*os.File, error) { return openLock(tree, name) })
}

// LockNamespaces locks the set of namespaces. Those who make a namespace share the lock; a sweep, and those who remove one, hold it
// alone. how is as for [disk.Lock].
func LockNamespaces(ctx context.Context, tree disk.Tree, how int) (*os.File, error) {
	return lockFile(ctx, tree, Namespaces, how)
}

// LockBlob excludes others who freshen or delete a blob, or change its labels. how is as for [disk.Lock]. fs.ErrNotExist if there is
// no blob.
//
// The blob's own file is not locked, since nobody may open it for writing. Blobs whose digests begin alike share a lock, so a
// process that has one must not wait for another.
func (d Dir) LockBlob(ctx context.Context, dgst digest.Digest, how int) (*os.File, error) {
	own := Dir{Tree: d.Tree}                         // without the alternates
	if _, _, err := own.FindBlob(dgst); err != nil { // no file is created for a blob that isn't there
		return nil, err
	}
	f, err := lockFile(ctx, d.Tree, LockName(dgst), how)
	if err != nil {
		return nil, err
	}
	if _, _, err := own.FindBlob(dgst); err != nil { // deleted meanwhile
		disk.Release(f)
		return nil, err
	}
	return f, nil
}

// LockName is the name of a blob's lock, which blobs share whose digests begin alike. The digest must be valid.
func LockName(dgst digest.Digest) string {
	_, hex, _ := strings.Cut(string(dgst), ":")
	return hex[:2]
}

// freshenAll marks all blobs of a lock, which is held, as used now: it changes the size of the lock's file, which is empty
// otherwise. A file that is open for reading only is left as it is.
func freshenAll(lock *os.File) error {
	fi, err := lock.Stat()
	if err == nil {
		err = lock.Truncate(fi.Size()%holdSizes + 1)
	}
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

// Freshened returns when all blobs of a lock were marked as used, the zero time if they never were.
func Freshened(lock *os.File) (time.Time, error) {
	fi, err := lock.Stat()
	if err != nil || fi.Size() == 0 {
		return time.Time{}, err
	}
	return fi.ModTime(), nil
}

// LockIndex locks index.json: nobody changes a name while it is locked. how is as for [disk.Lock]. fs.ErrNotExist if there
// is none.
func (d Dir) LockIndex(ctx context.Context, how int) (*os.File, error) {
	name := d.File(v1.ImageIndexFile)
	return d.Tree.LockOpened(ctx, name, how, func() (*os.File, error) { return d.Tree.OpenLock(name, 0, 0) })
}
