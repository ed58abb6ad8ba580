// Package snapshot keeps layered root filesystems: trees of files that are prepared from a parent, written to, and
// committed under a name from which others can be prepared.
//
// A snapshot has a key and a [Kind]. An Active snapshot can be written to. Commit turns it into a Committed one under
// another name, which never changes again and can be a parent. A View can be mounted to be read, but not written to or
// committed.
//
// [Open] returns a [Snapshotter], the snapshots of one driver in a store. Prepare, Mount, Commit and Remove are the
// steps for a single snapshot. Stack makes a whole chain of layers, several at a time. Sweep deletes the snapshots that
// nothing needs.
//
// Everything is plain files below <root>/snapshots/<driver>/, described in layout(5). There is no daemon and no
// database. Any number of processes may work on a store at the same time, with locks of the kernel. A process killed at
// any instant leaves nothing visible, except temporary files that a later call deletes.
//
// A [Driver] makes and mounts the files of snapshots: see the packages overlayfs, erofs, btrfs, native and snapdriver.
// Package snapshottest is the conformance suite of drivers. Error classes are listed at [Snapshotter].
package snapshot

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// Kind is the kind of a snapshot. It decides what can be done with it.
type Kind string

const (
	View      Kind = "View"      // mounted read-only; can't be a parent
	Active    Kind = "Active"    // can be written to, and committed or removed; can't be a parent
	Committed Kind = "Committed" // never changes; can be a parent; is not mounted itself
)

// Info describes a snapshot.
type Info struct {
	Key     string            `json:"key"`
	Kind    Kind              `json:"kind"`
	Parent  string            `json:"parent,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	Created time.Time         `json:"created"`
	Updated time.Time         `json:"updated"`
}

// Field returns the fields that containerd's filters know: kind (in lower case, as there), name (the key), parent,
// labels.KEY.
func (i Info) Field(fieldpath []string) (value string, present bool) {
	switch {
	case len(fieldpath) > 1 && fieldpath[0] == "labels":
		value, present = i.Labels[strings.Join(fieldpath[1:], ".")]
	case len(fieldpath) != 1:
	case fieldpath[0] == "kind":
		return strings.ToLower(string(i.Kind)), true
	case fieldpath[0] == "name", fieldpath[0] == "key":
		return i.Key, true
	case fieldpath[0] == "parent":
		return i.Parent, true
	}
	return value, present
}

// Usage is the space that a snapshot takes itself. Files that the driver shares with the parents are not counted.
type Usage struct {
	Size   int64 `json:"size"`   // bytes allocated
	Inodes int64 `json:"inodes"` // files of all types, hard links counted once
}

// Mount is one mount to be made, in the terms of mount(2): type, source and options.
type Mount struct {
	Type    string   `json:"type"`
	Source  string   `json:"source"`
	Options []string `json:"options"`
}

// Tree tells a driver where the files of a snapshot are.
type Tree struct {
	// Dir is the snapshot's own directory, an absolute path. Its root filesystem is Dir/fs. The name info is reserved;
	// the driver may use any other. The directories of all snapshots of a store are siblings.
	Dir  string
	Kind Kind
	// Parents are the directories of the committed snapshots below it, the nearest first.
	Parents []string
}

// FS returns the directory of the files that the snapshot holds itself.
func (t Tree) FS() string { return filepath.Join(t.Dir, "fs") }

// ParentFS returns FS of the parent, which must exist.
func (t Tree) ParentFS() string { return Tree{Dir: t.Parents[0]}.FS() }

// Driver makes, mounts and removes the directories of snapshots for one kind of filesystem. No method is called while
// the store's lock is held, so each may take its time.
type Driver interface {
	// Name is the driver's name, and the name of its directory in the store.
	Name() string
	// Check finds out by trying whether the driver works with snapshots below dir, which exists. It returns
	// NotImplemented or PermissionDenied with the reason if not. It leaves nothing behind.
	Check(ctx context.Context, dir string) error
	// Init prepares dir before the first snapshot is made there. It may be called more than once.
	Init(dir string) error
	// MaxParents is the largest number of snapshots below another one; 0 means no limit.
	MaxParents() int
	// Whiteouts is the form of whiteouts (see dist-apply(1)) for a snapshot that is prepared without a parent and gets
	// one from Commit. It is empty if the driver does not support that in the store in dir. An [Archiver] returns
	// ArchiveForm.
	Whiteouts(dir string) string
	// Settle completes the layer in t, which was applied without its parents, now that these are known. unresolved, the
	// output of dist-apply --unresolved, lists what the layer could not decide alone. FailedPrecondition: only applying
	// the layer again, on its mounted parent, gives the right result. After an error the layer must not be used.
	Settle(ctx context.Context, t Tree, unresolved io.Reader) error
	// Create fills t.Dir, which is empty and used by nobody else. The parents do not change while it runs. The root
	// directory of the files gets the parent's attributes, or mode 0755 without a parent.
	Create(ctx context.Context, t Tree) error
	// Mounts returns the mounts that show the snapshot, to be made in order on one directory.
	Mounts(t Tree) ([]Mount, error)
	// Mount mounts the snapshot on target, an absolute path.
	Mount(t Tree, target string, o MountOptions) error
	// Open opens the root directory that a mount of the snapshot would show. No mount remains after the file is closed.
	Open(t Tree) (*os.File, error)
	// Usage measures the space that the snapshot takes itself.
	Usage(ctx context.Context, t Tree) (Usage, error)
	// Remove deletes the directory of a snapshot, or what an interrupted Create has left.
	Remove(ctx context.Context, dir string) error
}

// ArchiveForm is a value of --whiteouts, like the forms of whiteouts: the layer is stored as an archive, and no file
// of it is created.
const ArchiveForm = "archive"

// LayerDir is the subdirectory of a snapshot in which Stack has a layer stored in ArchiveForm.
const LayerDir = "layer"

// Here stands in the options of a Mount for the directory on which mounts are made.
const Here = "{dir}"

// Diff writes the directory of changes of an overlay as a plain layer.
type Diff func(ctx context.Context, upper *os.File, w io.Writer) error

// An Archiver is a driver that keeps a committed snapshot as the archive of a layer, not as files.
type Archiver interface {
	Driver
	// Archive makes the archive of an active snapshot that will be committed, unless Stack has stored one. It keeps the
	// files, since the commit may fail.
	Archive(ctx context.Context, t Tree, diff Diff) error
	// Committed deletes the files that Archive has made an archive of. After a crash they stay until the snapshot is
	// removed.
	Committed(t Tree) error
	// Complete prepares what the first child of the committed snapshots in the directories parents will need. Its error
	// tells what is wrong with the layers together. If it makes something, left counts by kind what the layers have and
	// the driver can't show.
	Complete(ctx context.Context, parents []string) (left map[string]int64, err error)
}

// Options configure a Snapshotter.
type Options struct {
	Diff Diff // needed for commits by an Archiver, which otherwise fail with NotImplemented
	// Left, if not nil, is called after Stack has made a chain, with what the layers have and an Archiver can't show.
	Left      func(name string, left map[string]int64)
	Namespace string // namespace of the keys; "" means "default"
	NoSync    bool   // don't sync: after a power failure commits and removals may be lost
}

// CommitOptions are options of Commit.
type CommitOptions struct {
	// Parent becomes the parent of a snapshot that was prepared without one. The driver must support that: see
	// Driver.Whiteouts.
	Parent string
	// Settle is the output of dist-apply --unresolved for the layer in the snapshot, which was prepared without a
	// parent. If it lists something that can't be settled, Commit fails with FailedPrecondition, and so does every
	// later call, since the files are half changed.
	Settle io.Reader
	// Mounted allows a snapshot to be committed while it is mounted. The caller must ensure that nothing writes to it
	// any more.
	Mounted bool
	// Labels are the labels of the committed snapshot. Those of the active one are dropped.
	Labels map[string]string
}

const (
	maxKey   = 4096
	maxLabel = 4096 // key and value together, as in containerd
	maxName  = 76   // of a namespace, as in containerd's pkg/identifiers
)

func checkKey(what, key string) error {
	switch {
	case key == "":
		return errdefs.ErrInvalidArgument.WithMessage(what + " is empty")
	case len(key) > maxKey:
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%s is longer than %d bytes", what, maxKey))
	case !utf8.ValidString(key):
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%s %q is not UTF-8", what, key))
	case strings.ContainsAny(key, "\x00\n"):
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%s %q holds a NUL or newline", what, key))
	}
	return nil
}

// checkNamespace applies containerd's rule for namespaces: letters and digits, with single '.', '-' or '_' between
// them.
func checkNamespace(ns string) error {
	ok := ns != "" && len(ns) <= maxName
	mark := true
	for _, c := range []byte(ns) {
		switch {
		case '0' <= c && c <= '9', 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z':
			mark = false
		case (c == '.' || c == '-' || c == '_') && !mark:
			mark = true
		default:
			ok = false
		}
	}
	if !ok || mark {
		return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(
			"namespace %q: at most %d letters and digits, with single '.', '-' or '_' between them", ns, maxName))
	}
	return nil
}

func checkLabels(labels map[string]string) error {
	for k, v := range labels {
		switch {
		case k == "":
			return errdefs.ErrInvalidArgument.WithMessage("a label's name is empty")
		case len(k)+len(v) > maxLabel:
			return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("label %.40q: name and value are longer than %d bytes", k, maxLabel))
		case !utf8.ValidString(k) || !utf8.ValidString(v):
			return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("label %.40q is not UTF-8", k))
		}
	}
	return nil
}

// isDigest reports whether a committed snapshot's name is a digest. The snapshot is then the same in every namespace.
func isDigest(name string) bool {
	alg, hex, ok := strings.Cut(name, ":")
	if !ok || len(hex) != map[string]int{"sha256": 64, "sha384": 96, "sha512": 128}[alg] {
		return false
	}
	return strings.Trim(hex, "0123456789abcdef") == ""
}
