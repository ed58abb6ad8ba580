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

// locks is the directory of files that exist only to be locked (distkit-layout(5), FILES).
const locks = "locks"

// openLock opens a file to lock it, and creates it if need be. A file that this user may not write to, such as another
// user's, or one on a read-only mount, is opened for reading.
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

// giveAway gives a file that root created in another user's store to that user, who has to be able to write to it.
func giveAway(tree disk.Tree, f *os.File) {
	if os.Geteuid() != 0 {
		return
	}
	var store, st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) == nil && st.Uid == 0 && unix.Stat(string(tree), &store) == nil && store.Uid != 0 {
		_ = f.Chown(int(store.Uid), int(store.Gid)) // on failure the user can still lock it, but not announce a hold
	}
}

// lockFile locks a file of the directory locks. how is as for [disk.Lock].
func lockFile(ctx context.Context, tree disk.Tree, name string, how int) (*os.File, error) {
	name = path.Join(locks, name)
	return tree.LockOpened(ctx, name, how, func() (*os.File, error) { return openLock(tree, name) })
}

// LockNamespaces locks the set of namespaces: shared to create a namespace, exclusively to sweep or to remove one. how
// is as for [disk.Lock].
func LockNamespaces(ctx context.Context, tree disk.Tree, how int) (*os.File, error) {
	return lockFile(ctx, tree, Namespaces, how)
}

// LockBlob locks a blob against other processes that freshen it, delete it, or change its labels. how is as for
// [disk.Lock]. fs.ErrNotExist if the layout doesn't have the blob.
//
// The lock is on a separate file, because a blob is read-only, and an exclusive lock on NFS needs a writable file.
// Blobs whose digests begin alike share it, so a process that holds one blob's lock must not wait for another's.
func (d Dir) LockBlob(ctx context.Context, dgst digest.Digest, how int) (*os.File, error) {
	own := Dir{Tree: d.Tree}                         // ignores alternates
	if _, _, err := own.FindBlob(dgst); err != nil { // creates no lock file for a missing blob
		return nil, err
	}
	f, err := lockFile(ctx, d.Tree, LockName(dgst), how)
	if err != nil {
		return nil, err
	}
	if _, _, err := own.FindBlob(dgst); err != nil { // deleted while this waited for the lock
		disk.Release(f)
		return nil, err
	}
	return f, nil
}

// LockName returns the name of a blob's lock file, which it shares with blobs whose digests begin alike. The digest
// must be valid.
func LockName(dgst digest.Digest) string {
	_, hex, _ := strings.Cut(string(dgst), ":")
	return hex[:2]
}

// freshenAll marks all blobs that share a lock as used now, by changing the size of the lock file, which is otherwise
// empty. The caller holds the lock. A file that is open for reading only is left unchanged.
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

// Freshened returns when all blobs that share a lock were marked as used. It is the zero time if they never were.
func Freshened(lock *os.File) (time.Time, error) {
	fi, err := lock.Stat()
	if err != nil || fi.Size() == 0 {
		return time.Time{}, err
	}
	return fi.ModTime(), nil
}

// LockIndex locks index.json against changes of names. how is as for [disk.Lock]. fs.ErrNotExist if index.json doesn't
// exist.
func (d Dir) LockIndex(ctx context.Context, how int) (*os.File, error) {
	name := d.File(v1.ImageIndexFile)
	return d.Tree.LockOpened(ctx, name, how, func() (*os.File, error) { return d.Tree.OpenLock(name, 0, 0) })
}
