// Package snapshot keeps layered root filesystems: trees of files that are prepared from a
// parent, written to, and committed under a name from which others can be prepared.
//
// A snapshot has a key and a kind. An Active one can be written to; Commit turns it into a
// Committed one under another name, which never changes again and can be a parent. A View is
// an Active one that can't be written to or committed.
//
// Everything is plain files below <root>/snapshots/<driver>/, described in layout(5). There
// is no daemon and no database: any number of processes may work on a store at once, and a
// process that dies at any instant leaves either nothing that can be seen or something that
// the next call throws away.
//
// What differs between filesystems is a [Driver]'s: see the packages overlayfs and native.
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

// Kind tells what may be done with a snapshot.
type Kind string

const (
	View      Kind = "View"      // mounted read-only, never a parent
	Active    Kind = "Active"    // mounted writable, to be committed or removed, never a parent
	Committed Kind = "Committed" // unchangeable, can be a parent, is not mounted
)

// Info is what is known of a snapshot.
type Info struct {
	Key     string            `json:"key"`
	Kind    Kind              `json:"kind"`
	Parent  string            `json:"parent,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	Created time.Time         `json:"created"`
	Updated time.Time         `json:"updated"`
}

// Field gives the fields that containerd's filters know: kind (in lower case, as there),
// name (the key), parent, labels.KEY.
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

// Usage is what a snapshot itself takes, its parents left out where the driver shares them.
type Usage struct {
	Size   int64 `json:"size"`   // bytes allocated
	Inodes int64 `json:"inodes"` // files of all types, hard links counted once
}

// Mount is one mount to make, in the form mount(2) takes: type, source, and options.
type Mount struct {
	Type    string   `json:"type"`
	Source  string   `json:"source"`
	Options []string `json:"options"`
}

// Tree is where one snapshot lies, as a driver sees it.
type Tree struct {
	// Dir is the snapshot's own directory, absolute. Its root filesystem is in Dir/fs; the
	// name info is taken, any other is the driver's. All directories of a store are siblings.
	Dir  string
	Kind Kind
	// Parents are the directories of the committed snapshots below, the nearest first.
	Parents []string
}

// FS is the tree of files that the snapshot itself holds.
func (t Tree) FS() string { return filepath.Join(t.Dir, "fs") }

// ParentFS is the tree of files of the snapshot below, of which there must be one.
func (t Tree) ParentFS() string { return Tree{Dir: t.Parents[0]}.FS() }

// Driver is how one kind of filesystem makes, shows and removes a snapshot's directory.
// None of its methods is called under the store's lock, so they may take their time.
type Driver interface {
	// Name is the driver's name, and its directory's in the store.
	Name() string
	// Check tells by trying whether the driver works with snapshots below dir, which exists:
	// nil, or a NotImplemented or PermissionDenied error that says why not. It leaves nothing.
	Check(ctx context.Context, dir string) error
	// Init prepares dir, where the snapshots will be, before there is any. It may be called
	// more than once.
	Init(dir string) error
	// MaxParents is how many snapshots may lie below one; 0 is without limit.
	MaxParents() int
	// Whiteouts is the form of whiteouts (see dist-apply(1)) in a snapshot that is prepared without
	// a parent and given one by Commit. It is empty if the driver can't do that in the store in dir.
	// An [Archiver] returns ArchiveForm.
	Whiteouts(dir string) string
	// Settle gives the layer in t, which was made without parents, those that it is to have: it
	// does what unresolved, the output of dist-apply --unresolved, says the layer alone could
	// not tell. FailedPrecondition where only applying the layer again, on its mounted parent,
	// gives what is right. After an error the layer is not to be used.
	Settle(ctx context.Context, t Tree, unresolved io.Reader) error
	// Create fills t.Dir, which is empty and which nobody else uses. The parents stay as
	// they are while it runs. Its root directory has mode 0755, or is like the parent's.
	Create(ctx context.Context, t Tree) error
	// Mounts are the mounts that show the snapshot, to be made in order at one place.
	Mounts(t Tree) ([]Mount, error)
	// Mount mounts the snapshot at target, an absolute path.
	Mount(t Tree, target string, o MountOptions) error
	// Open opens the root directory that mounting the snapshot would show, without a mount that
	// outlives the file.
	Open(t Tree) (*os.File, error)
	// Usage measures what the snapshot itself holds.
	Usage(ctx context.Context, t Tree) (Usage, error)
	// Remove deletes the directory of a snapshot, or what a Create that was cut short left.
	Remove(ctx context.Context, dir string) error
}

// ArchiveForm is the form of whiteouts in an archive: it is stored as it is, not applied.
const ArchiveForm = "archive"

// LayerDir is the directory in that of a snapshot where Stack has a layer stored in ArchiveForm.
const LayerDir = "layer"

// Here stands in a Mount's options for the place where mounts are made.
const Here = "{dir}"

// Diff writes the plain layer of an overlay upper directory.
type Diff func(ctx context.Context, upper *os.File, w io.Writer) error

// An Archiver is a driver that keeps a committed snapshot as the archive of a layer, not as files.
type Archiver interface {
	Driver
	// Archive makes the archive of an active snapshot that is to be committed, unless Stack has had it stored. The files stay: the commit may fail.
	Archive(ctx context.Context, t Tree, diff Diff) error
	// Committed deletes the files of which Archive has made an archive. A crash before leaves them until the snapshot is removed.
	Committed(t Tree) error
	// Complete makes what the first child of committed snapshots, which lie in the directories parents, needs, ahead of it. Its error
	// is what is wrong with the layers together. It counts what of them the driver can't show, by kind, when that is made.
	Complete(ctx context.Context, parents []string) (left map[string]int64, err error)
}

// Options say how a store is used.
type Options struct {
	Diff Diff // for commits by an Archiver, which else are NotImplemented
	// Left is called with what of the layers of a chain that Stack has made an Archiver can't show. It may be nil.
	Left      func(name string, left map[string]int64)
	Namespace string // partition of the keys; empty is "default"
	NoSync    bool   // don't wait for the disk: after a power failure commits and removals may be lost
}

// CommitOptions are what a commit may change besides kind and name.
type CommitOptions struct {
	// Parent is given to a snapshot that was prepared without one, by a driver that rebases.
	Parent string
	// Settle is what dist-apply --unresolved has written of the layer that the snapshot, prepared
	// without a parent, holds. Where it says what can't be settled, Commit is
	// FailedPrecondition; and so is every later one, since the files are half changed.
	Settle io.Reader
	// Mounted allows a snapshot to be committed while it is mounted. The caller sees to it that nothing is
	// written there any more.
	Mounted bool
	// Labels are the committed snapshot's; those of the active one are not carried over.
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

// checkNamespace holds a namespace to containerd's rule: letters and digits, with single
// '.', '-' or '_' between them.
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

// isDigest tells whether a committed name is content-addressed, and so the same thing in
// every namespace.
func isDigest(name string) bool {
	alg, hex, ok := strings.Cut(name, ":")
	if !ok || len(hex) != map[string]int{"sha256": 64, "sha384": 96, "sha512": 128}[alg] {
		return false
	}
	return strings.Trim(hex, "0123456789abcdef") == ""
}
