// Package layout keeps the files of an OCI image layout (image-spec v1.1, image-layout.md) as distkit-layout(5)
// specifies them: the version, the names in index.json, and the locks and times of blobs. A store is a layout, each of
// its namespaces is a layout that shares the store's blobs, and so is a directory that another tool wrote.
//
// [Open] selects a layout as a [Dir]. [Dir.FindBlob], [Dir.OpenBlob] and [Dir.PutBlob] read and store blobs.
// [Dir.ReadIndex] parses the names into an [Index] of [Entry] values, and [Dir.Change] modifies them under a lock.
// [Dir.LockBlob], [Share] and [LockNamespaces] are the locks that keep processes apart, and [Dir.Referrers] finds
// documents that refer to others. [Members] and [Elements] read JSON without decoding it.
//
// The content of a layout is untrusted: files are those of a [disk.Tree], so symbolic links are not followed and sizes
// are bounded. What is written is complete and durable before it gets its name.
//
// Errors have classes of [github.com/containerd/errdefs]: FailedPrecondition for a file that is damaged or of an
// unknown version, InvalidArgument for labels or namespaces that can't be, NotImplemented for a file system without
// locks. A missing file is fs.ErrNotExist.
package layout

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"distkit/disk"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

const (
	emptyLayout = `{"imageLayoutVersion":"` + v1.ImageLayoutVersion + "\"}\n"
	emptyIndex  = `{"schemaVersion":2,"mediaType":"` + v1.MediaTypeImageIndex + `","manifests":[]}` + "\n"
)

const (
	// Namespaces is the directory of a store's namespaces, and Ingest that of blobs being written.
	Namespaces = "namespaces"
	Ingest     = "ingest"
	// TempPrefix begins the name of a temporary file, which is renamed or linked to its final name.
	TempPrefix = ".tmp-"
	// blobsLink is the text of a namespace's symbolic link blobs.
	blobsLink = "../../" + v1.ImageBlobsDir
)

// maxVersion bounds the size of oci-layout in bytes.
const maxVersion = 64 << 10

// IsStore reports whether a layout is a store. A layout that another tool wrote has no event log, and no sweep waits
// for holds on it.
func IsStore(tree disk.Tree) bool {
	fi, err := tree.Stat(Ingest)
	return err == nil && fi.IsDir()
}

// Dir is an image layout: the directory Name in a tree, which has the blobs. Name is "." or, for a namespace,
// namespaces/NAME.
type Dir struct {
	Tree       disk.Tree
	Name       string
	Alternates []disk.Tree // see [AlternatesEnv]
}

// Open selects the layout in a directory, which need not exist, and its alternates. The directory of a namespace is
// recognised, and selected as part of its store.
func Open(root string) (Dir, error) {
	d, err := open(root)
	if err == nil {
		d.Alternates, err = alternates(os.Getenv(AlternatesEnv))
	}
	return d, err
}

// open is Open without the alternates.
func open(root string) (Dir, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return Dir{}, err
	}
	d := Dir{Tree: disk.Tree(root), Name: "."}
	if target, err := os.Readlink(d.Tree.Path(v1.ImageBlobsDir)); err != nil || filepath.Clean(target) != blobsLink {
		return d, nil
	}
	real, err := filepath.EvalSymlinks(root)
	if err != nil {
		return Dir{}, err
	}
	store := filepath.Dir(filepath.Dir(real))
	if filepath.Base(filepath.Dir(real)) != Namespaces {
		return d, nil
	}
	return Dir{Tree: disk.Tree(store), Name: path.Join(Namespaces, filepath.Base(real))}, nil
}

// DefaultNamespace is the namespace whose names are in the store's own index.json.
const DefaultNamespace = "default"

// Resolve returns the store and the namespace that root and namespace select. If root is the directory of a namespace,
// the result is its store and that namespace. namespace must then be that one, "" or [DefaultNamespace]; any other is
// InvalidArgument.
func Resolve(root, namespace string) (store, selected string, err error) {
	d, err := open(root)
	if err != nil || d.Name == "." {
		return root, namespace, err
	}
	selected, err = Within(path.Base(d.Name), namespace)
	return string(d.Tree), selected, err
}

// Within returns the namespace that is selected, as Resolve does. own is the namespace whose directory the root is, or
// "" if the root is a store.
func Within(own, namespace string) (string, error) {
	if own != "" && namespace != own && namespace != DefaultNamespace && namespace != "" {
		return "", errclass.Errorf(errdefs.ErrInvalidArgument, "namespace %.80q: the store was given by the directory of namespace %s", namespace, own)
	}
	return cmp.Or(own, namespace), nil
}

// File returns the name of one of the layout's files within the tree.
func (d Dir) File(name string) string { return path.Join(d.Name, name) }

// Path returns the path of one of the layout's files, for messages.
func (d Dir) Path(name string) string { return d.Tree.Path(d.File(name)) }

// Check reads the layout's version. fs.ErrNotExist if the layout doesn't exist, FailedPrecondition for an unknown
// version.
func (d Dir) Check() error {
	b, err := d.Tree.ReadFile(d.File(v1.ImageLayoutFile), maxVersion)
	if err != nil {
		return err
	}
	var v v1.ImageLayout
	if err := json.Unmarshal(b, &v); err != nil {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "parse %s: %w", v1.ImageLayoutFile, err)
	}
	if v.Version != v1.ImageLayoutVersion {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "image layout version %.40q is not known (only %s)", v.Version, v1.ImageLayoutVersion)
	}
	return nil
}

// Exists reports whether the layout has both oci-layout and index.json. FailedPrecondition if only index.json is
// missing, because its names are lost.
func (d Dir) Exists() (bool, error) {
	for range indexTries {
		_, err := d.Tree.Stat(d.File(v1.ImageIndexFile))
		if err == nil {
			_, err = d.Tree.Stat(d.File(v1.ImageLayoutFile))
			return err == nil, ignoreMissing(err)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
		if _, err := d.Tree.Stat(d.File(v1.ImageLayoutFile)); err != nil {
			return false, ignoreMissing(err)
		}
		time.Sleep(indexPause)
	}
	return false, d.gone()
}

// How often, and at which interval, a missing index.json is looked for while oci-layout exists. Removing a namespace
// removes both files, one shortly after the other. On NFS, index.json is missing for a round trip when another client,
// which has it open, replaces it.
const (
	indexTries = 30
	indexPause = 10 * time.Millisecond
)

func (d Dir) gone() error {
	return errclass.Errorf(errdefs.ErrFailedPrecondition,
		"%s is gone, and the names with it: restore it, or give up all names by writing {\"schemaVersion\":2,\"manifests\":[]} there", d.Path(v1.ImageIndexFile))
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Create creates the layout in an existing directory, unless it is complete: first an index.json without names, and
// oci-layout last. Temporary files are made in the directory temp of the tree.
func (d Dir) Create(temp string) error {
	if there, err := d.Exists(); there || err != nil {
		return err
	}
	if err := d.publish(temp, v1.ImageIndexFile, emptyIndex); err != nil {
		return err
	}
	return d.publish(temp, v1.ImageLayoutFile, emptyLayout)
}

// publish creates a file of the layout, complete and durable, unless it exists.
func (d Dir) publish(temp, name, text string) error {
	name = d.File(name)
	if _, err := d.Tree.Stat(name); err == nil {
		return nil
	}
	tmp, err := WriteTemp(d.Tree, temp, func(f *os.File) error {
		_, err := f.WriteString(text)
		return err
	})
	if err != nil {
		return err
	}
	defer d.Tree.Remove(tmp)
	err = d.Tree.Link(tmp, name)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENOSYS) {
		err = d.renameNew(tmp, name) // the file system has no hard links
	}
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return d.Tree.SyncDir(d.Name)
}

// renameNew renames a file; fs.ErrExist if the new name is taken. On a file system that can't do both at once, a lock
// on the layout's directory keeps processes that create files in it apart.
func (d Dir) renameNew(from, to string) error {
	if err := d.Tree.RenameNew(from, to); !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	dir, err := d.Tree.OpenDir(d.Name)
	if err != nil {
		return err
	}
	defer disk.Release(dir)
	if err := disk.Lock(dir, unix.LOCK_EX); err != nil {
		return err
	}
	if _, err := d.Tree.Stat(to); err == nil {
		return fs.ErrExist
	}
	return d.Tree.Rename(from, to)
}

// TempName returns a random name for a temporary file in dir.
func TempName(dir string) string {
	return path.Join(dir, TempPrefix+strconv.FormatUint(rand.Uint64(), 36))
}

// WriteTemp writes and syncs a temporary file in a directory of the tree, for the caller to rename or link into place.
// It returns the file's name in the tree.
func WriteTemp(tree disk.Tree, dir string, write func(*os.File) error) (name string, err error) {
	if err := tree.MakeDir(dir); err != nil {
		return "", err
	}
	name = TempName(dir)
	if err = tree.CreateBy(name, 0o666, true, write); err != nil && !errors.Is(err, fs.ErrExist) {
		_ = tree.Remove(name)
	}
	return name, err
}

// BlobName returns the name of a blob's file in the tree. The digest must be valid.
func BlobName(dgst digest.Digest) string {
	alg, hex, _ := strings.Cut(string(dgst), ":")
	return path.Join(v1.ImageBlobsDir, alg, hex)
}

// Freshen marks a blob as used now, so that a concurrent sweep spares it. fs.ErrNotExist if the layout doesn't have it.
// In a store that this user can't write to, it does nothing.
func (d Dir) Freshen(ctx context.Context, dgst digest.Digest) error {
	f, err := d.LockBlob(ctx, dgst, unix.LOCK_EX)
	if err == nil {
		defer disk.Release(f)
		err = d.Tree.Chtimes(BlobName(dgst), time.Now())
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) {
			// The blob is another user's, or the file system can't set times.
			return freshenAll(f)
		}
	}
	if disk.Unwritable(err) {
		return nil
	}
	return err
}

// Retain freshens a blob and makes its name durable, which the process that published it may not have done yet.
// fs.ErrNotExist if the layout doesn't have it. In a store that this user can't write to, it does nothing.
func (d Dir) Retain(ctx context.Context, dgst digest.Digest) error {
	if err := d.Freshen(ctx, dgst); err != nil {
		return err
	}
	err := d.Tree.SyncDir(path.Dir(BlobName(dgst)))
	if disk.Unwritable(err) {
		return nil
	}
	return err
}

// PutBlob stores a blob. If the layout has it already, with the expected size, PutBlob retains it and doesn't call
// write. expected is the blob's size, or -1 if it is unknown; a blob of another size is damaged, and is replaced. When
// PutBlob returns nil the blob is on disk.
//
// write gets a file that has begin bytes and is positioned after them. It writes the rest, and must fail unless all
// bytes together hash to the digest. begin is 0, or at most the result of [Dir.PartSize].
//
// If write is interrupted (its error is Aborted, or ctx is done), what it wrote is kept for another call. PutBlob
// itself returns Aborted if there are fewer than begin bytes now.
func (d Dir) PutBlob(ctx context.Context, dgst digest.Digest, expected, begin int64, write func(*os.File) error) (size int64, exists bool, err error) {
	fi, err := d.Tree.Stat(BlobName(dgst))
	if err == nil && (expected < 0 || fi.Size() == expected) {
		if err = d.Retain(ctx, dgst); err == nil {
			return fi.Size(), true, nil
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, false, err
	}
	f, temp, err := d.openTemp(ctx, dgst, begin)
	if err != nil {
		return 0, false, err
	}
	defer disk.Release(f) // not before the file has its name
	if err = write(f); err == nil {
		fi, err = f.Stat()
	}
	if err == nil {
		err = f.Sync() // before Chmod: after a failure, a read-only file could not be resumed
	}
	if err == nil {
		err = f.Chmod(0o444)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		if have, serr := f.Stat(); temp != partName(dgst) || serr != nil || have.Size() < minPart || !errdefs.IsAborted(err) && ctx.Err() == nil {
			_ = d.Tree.Remove(temp)
		}
		return 0, false, err
	}
	name := BlobName(dgst)
	// A process that holds the lock may be about to delete the damaged blob.
	lock, err := d.LockBlob(ctx, dgst, unix.LOCK_EX)
	if err == nil {
		defer disk.Release(lock)
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = d.Tree.Rename(temp, name)
	}
	if err != nil {
		_ = d.Tree.Remove(temp)
		return 0, false, err
	}
	return fi.Size(), false, d.Tree.SyncDir(path.Dir(name))
}

// minPart is the number of bytes from which an interrupted put is kept.
const minPart = 64 << 10

// partName returns the name of the file that a put of a blob writes. It is in the directory of the blobs, which may be
// on another file system than the layout, and is not a valid blob name.
func partName(dgst digest.Digest) string {
	return path.Join(path.Dir(BlobName(dgst)), TempPrefix+dgst.Encoded())
}

// PartSize returns how many bytes an interrupted put of a blob has left for another put to continue, or 0.
func (d Dir) PartSize(ctx context.Context, dgst digest.Digest) int64 {
	f, size, err := d.openPart(ctx, dgst, 0)
	if err != nil {
		return 0
	}
	disk.Release(f)
	if size < minPart {
		return 0
	}
	return size
}

// openPart opens and locks the file of an interrupted put.
func (d Dir) openPart(ctx context.Context, dgst digest.Digest, flag int) (f *os.File, size int64, err error) {
	f, err = d.Tree.LockFile(ctx, partName(dgst), os.O_RDWR|flag, 0o600, unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return nil, 0, err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	if err == nil && (st.Nlink != 1 || int(st.Uid) != os.Geteuid()) {
		err = errclass.Errorf(errdefs.ErrFailedPrecondition, "%s is another user's, or has other names", f.Name())
	}
	if err != nil {
		disk.Release(f)
		return nil, 0, err
	}
	return f, st.Size, nil
}

// openTemp opens the file that a put writes, at offset begin. It is the file of partName with its first begin bytes. If
// that can't be used and begin is 0, it is a new file.
func (d Dir) openTemp(ctx context.Context, dgst digest.Digest, begin int64) (f *os.File, name string, err error) {
	dir := path.Dir(BlobName(dgst))
	if err := d.Tree.MakeDir(dir); err != nil {
		return nil, "", err
	}
	name = partName(dgst)
	f, size, err := d.openPart(ctx, dgst, os.O_CREATE)
	if errdefs.IsNotImplemented(err) {
		return nil, "", err // the file system has no locks
	}
	if err == nil && size < begin {
		disk.Release(f)
	}
	if begin > 0 && (err != nil || size < begin) {
		return nil, "", errclass.Errorf(errdefs.ErrAborted, "the first %d bytes are no longer there: put all of it", begin)
	}
	if err != nil {
		name = TempName(dir)
		f, err = d.Tree.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		return f, name, err
	}
	if err = f.Truncate(begin); err == nil {
		_, err = f.Seek(begin, io.SeekStart)
	}
	if err != nil {
		disk.Release(f)
		return nil, "", err
	}
	return f, name, nil
}
