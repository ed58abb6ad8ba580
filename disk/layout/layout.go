// Package layout keeps the files of an OCI image layout (image-spec v1.1, image-layout.md) as distkit-layout(5) says:
// the version, the names in index.json, and the locks and times of blobs. A store is a layout, each of its namespaces
// is one that shares its blobs, and so is a directory that another tool wrote.
//
// Files are those of a [disk.Tree]: symbolic links are not followed. Errors carry the classes of
// [github.com/containerd/errdefs]: FailedPrecondition for files that are damaged, or of an unknown version.
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
	// Namespaces is the directory of a store's namespaces, and Ingest that of blobs on their way in.
	Namespaces = "namespaces"
	Ingest     = "ingest"
	// Aside begins the name of a file that is written aside.
	Aside = ".tmp-"
	// blobsLink is where a namespace's blobs are.
	blobsLink = "../../" + v1.ImageBlobsDir
)

// maxVersion bounds oci-layout, in bytes.
const maxVersion = 64 << 10

// IsStore reports whether a layout is a store. Another tool's layout has neither a log of events nor sweeps, which wait for holds.
func IsStore(tree disk.Tree) bool {
	fi, err := tree.Stat(Ingest)
	return err == nil && fi.IsDir()
}

// Dir is an image layout: a directory of a tree, which has the blobs. Name is "." but for a namespace's.
type Dir struct {
	Tree       disk.Tree
	Name       string
	Alternates []disk.Tree // see [AlternatesEnv]
}

// Open selects the layout in a directory, and its alternates. It need not exist. The directory of a namespace is
// recognised, and selected as a part of its store.
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

// Resolve returns the store that a root stands for, and the namespace that is meant. If the root is the directory of a namespace,
// it is that one: "" and [DefaultNamespace] stand for it too, and any other is InvalidArgument.
func Resolve(root, namespace string) (store, of string, err error) {
	d, err := open(root)
	if err != nil || d.Name == "." {
		return root, namespace, err
	}
	of, err = Within(path.Base(d.Name), namespace)
	return string(d.Tree), of, err
}

// Within returns the namespace that is meant, as Resolve does. own is the namespace whose directory the root is, "" if it is the
// store's.
func Within(own, namespace string) (string, error) {
	if own != "" && namespace != own && namespace != DefaultNamespace && namespace != "" {
		return "", errclass.Errorf(errdefs.ErrInvalidArgument, "namespace %.80q: the store was given by the directory of namespace %s", namespace, own)
	}
	return cmp.Or(own, namespace), nil
}

// File is the name of one of the layout's files in the tree.
func (d Dir) File(name string) string { return path.Join(d.Name, name) }

// Path is the path of one of the layout's files, for messages.
func (d Dir) Path(name string) string { return d.Tree.Path(d.File(name)) }

// Check reads the layout's version. fs.ErrNotExist if there is none, FailedPrecondition for an unknown one.
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

// Exists reports whether the layout is complete: it has oci-layout and index.json. FailedPrecondition if index.json alone
// is gone, since the names were in it.
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

// An index.json that isn't there is looked for this often before it counts as gone. The removal of a namespace takes it
// away at once with oci-layout. On NFS, it is away for the time of an answer when another client, which has it open, replaces it.
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

// Create makes the layout, whose directory exists, unless it is there: an index.json without names first, oci-layout last.
// Files are written aside in the directory aside of the tree.
func (d Dir) Create(aside string) error {
	if there, err := d.Exists(); there || err != nil {
		return err
	}
	if err := d.publish(aside, v1.ImageIndexFile, emptyIndex); err != nil {
		return err
	}
	return d.publish(aside, v1.ImageLayoutFile, emptyLayout)
}

// publish puts a file into the layout, whole and durable, unless one of that name is there.
func (d Dir) publish(aside, name, text string) error {
	name = d.File(name)
	if _, err := d.Tree.Stat(name); err == nil {
		return nil
	}
	tmp, err := WriteAside(d.Tree, aside, func(f *os.File) error {
		_, err := f.WriteString(text)
		return err
	})
	if err != nil {
		return err
	}
	defer d.Tree.Remove(tmp)
	err = d.Tree.Link(tmp, name)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENOSYS) {
		err = d.renameNew(tmp, name) // a file system without hard links
	}
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return d.Tree.SyncDir(d.Name)
}

// renameNew renames a file unless there is one of the new name: fs.ErrExist. Where the file system can't do that, those who
// create files in the layout exclude each other by a lock.
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

// AsideName makes up a name in a directory for a file that is written aside.
func AsideName(dir string) string {
	return path.Join(dir, Aside+strconv.FormatUint(rand.Uint64(), 36))
}

// WriteAside writes a file into a directory of the tree, synced, that is to be renamed or linked into place. It returns
// the file's name in the tree.
func WriteAside(tree disk.Tree, dir string, write func(*os.File) error) (name string, err error) {
	if err := tree.MakeDir(dir); err != nil {
		return "", err
	}
	name = AsideName(dir)
	if err = tree.CreateBy(name, 0o666, true, write); err != nil && !errors.Is(err, fs.ErrExist) {
		_ = tree.Remove(name)
	}
	return name, err
}

// BlobName is the name of a blob's file in the tree. The digest must be valid.
func BlobName(dgst digest.Digest) string {
	alg, hex, _ := strings.Cut(string(dgst), ":")
	return path.Join(v1.ImageBlobsDir, alg, hex)
}

// Freshen marks a blob as used now, so that a sweep beside it spares it. fs.ErrNotExist if there is none. In a store that
// can't be written to the blob is left as it is.
func (d Dir) Freshen(ctx context.Context, dgst digest.Digest) error {
	f, err := d.LockBlob(ctx, dgst, unix.LOCK_EX)
	if err == nil {
		defer disk.Release(f)
		err = d.Tree.Chtimes(BlobName(dgst), time.Now())
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) {
			// It is another user's, or nobody can set times there.
			return freshenAll(f)
		}
	}
	if disk.Unwritable(err) {
		return nil
	}
	return err
}

// Retain freshens a blob, and makes its name durable: the process that publishes it may not have done so yet. fs.ErrNotExist if there
// is none. In a store that can't be written to the blob is left as it is.
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

// PutBlob stores a blob, unless it is there: then it is retained, and write isn't called. begin is 0, or at most the number that
// [Dir.PartSize] has told. write gets the file at that offset, with the bytes before it, and writes the rest; it fails if they all
// don't hash to the digest. expected is the blob's size, -1 if it is not known: a blob of another size is damaged,
// and is replaced. When PutBlob returns the blob is on disk.
//
// If write is interrupted (Aborted, or ctx is done), what it has written is kept for another call. Aborted: there are no longer as many
// bytes as begin.
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
	f, aside, err := d.openAside(ctx, dgst, begin)
	if err != nil {
		return 0, false, err
	}
	defer disk.Release(f) // after the file has its name
	if err = write(f); err == nil {
		fi, err = f.Stat()
	}
	if err == nil {
		err = f.Sync() // before the mode: a part that this user can't open for writing could not be gone on with
	}
	if err == nil {
		err = f.Chmod(0o444)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		if have, serr := f.Stat(); aside != partName(dgst) || serr != nil || have.Size() < minPart || !errdefs.IsAborted(err) && ctx.Err() == nil {
			_ = d.Tree.Remove(aside)
		}
		return 0, false, err
	}
	name := BlobName(dgst)
	// Whoever has the lock of a damaged blob may be about to delete it.
	lock, err := d.LockBlob(ctx, dgst, unix.LOCK_EX)
	if err == nil {
		defer disk.Release(lock)
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = d.Tree.Rename(aside, name)
	}
	if err != nil {
		_ = d.Tree.Remove(aside)
		return 0, false, err
	}
	return fi.Size(), false, d.Tree.SyncDir(path.Dir(name))
}

// minPart is the least number of bytes of an interrupted put that are kept.
const minPart = 64 << 10

// partName is the name of the file that a put of a blob writes. It is beside the blobs, which may be on another file system than the
// layout, and the name of no blob.
func partName(dgst digest.Digest) string {
	return path.Join(path.Dir(BlobName(dgst)), Aside+dgst.Encoded())
}

// PartSize returns how many bytes of a blob an interrupted put has left, 0 if there are none that another put may go on with.
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

// openPart opens and locks the file of partName.
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

// openAside opens the file that a put is to write, at an offset. It is the one of partName, with the bytes before the offset, or
// another one if that can't be had and the offset is 0.
func (d Dir) openAside(ctx context.Context, dgst digest.Digest, begin int64) (f *os.File, name string, err error) {
	dir := path.Dir(BlobName(dgst))
	if err := d.Tree.MakeDir(dir); err != nil {
		return nil, "", err
	}
	name = partName(dgst)
	f, size, err := d.openPart(ctx, dgst, os.O_CREATE)
	if errdefs.IsNotImplemented(err) {
		return nil, "", err // no locks
	}
	if err == nil && size < begin {
		disk.Release(f)
	}
	if begin > 0 && (err != nil || size < begin) {
		return nil, "", errclass.Errorf(errdefs.ErrAborted, "the first %d bytes are no longer there: put all of it", begin)
	}
	if err != nil {
		name = AsideName(dir)
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
