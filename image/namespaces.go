package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"

	"distkit/content"
	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/events"

	"github.com/containerd/errdefs"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Namespaces are the partitions of a store's names. The default one always exists. Any other is a directory in
// namespaces/, created with its first name or by Create.
type Namespaces struct {
	store *content.Store
}

// OpenNamespaces selects the namespaces of a store. It accesses nothing on disk.
func OpenNamespaces(store *content.Store) Namespaces { return Namespaces{store} }

// List returns all namespaces, sorted: the default one and those that have a layout. FailedPrecondition if one is a
// symbolic link or has lost its index.json.
func (n Namespaces) List() ([]string, error) {
	all := []string{DefaultNamespace}
	candidates, err := subdirs(n.store, layout.Namespaces)
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	for _, name := range candidates {
		if !identifier(name) || name == DefaultNamespace {
			continue
		}
		there, err := n.exists(name)
		if err != nil {
			return nil, err
		}
		if there {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all, nil
}

// exists reports whether List returns a namespace.
func (n Namespaces) exists(namespace string) (bool, error) {
	if namespace == DefaultNamespace {
		return true, nil
	}
	there, err := layout.Dir{Tree: n.store.Tree, Name: path.Join(layout.Namespaces, namespace)}.Exists()
	if err != nil {
		return false, fmt.Errorf("namespace %s: %w", namespace, err)
	}
	return there, nil
}

// Create creates a namespace with labels. AlreadyExists if it exists, also if another process creates it at the same
// time. InvalidArgument if it is not an identifier.
func (n Namespaces) Create(ctx context.Context, namespace string, labels map[string]string) error {
	names, err := openNames(n.store, namespace)
	if err != nil {
		return err
	}
	if err := n.store.Init(); err != nil {
		return err
	}
	lock, err := lockNamespaces(ctx, n.store, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer disk.Release(lock)
	if there, err := n.exists(namespace); err != nil {
		return err
	} else if there {
		return fmt.Errorf("namespace %s: %w", namespace, errdefs.ErrAlreadyExists)
	}
	labels = maps.Clone(labels)
	maps.DeleteFunc(labels, func(_, v string) bool { return v == "" })
	if _, err := names.make(labels); err != nil {
		return err
	}
	names.logMade(labels)
	return nil
}

// Labels returns the labels of a namespace: the annotations of its index. NotFound if it doesn't exist.
func (n Namespaces) Labels(namespace string) (map[string]string, error) {
	names, err := n.Open(namespace)
	if err != nil {
		return nil, err
	}
	ix, err := names.read()
	if err != nil {
		return nil, err
	}
	return (&index{Index: ix}).labels()
}

// SetLabels sets labels of a namespace; an empty value removes one. It returns all labels.
func (n Namespaces) SetLabels(ctx context.Context, namespace string, labels map[string]string) (map[string]string, error) {
	names, err := n.Open(namespace)
	if err != nil {
		return nil, err
	}
	var all map[string]string
	err = names.change(ctx, func(ix *index) error {
		if all, err = ix.setLabels(labels); err == nil {
			ix.events = append(ix.events, events.Event{Topic: "/namespaces/update", Name: namespace, Labels: all})
		}
		return err
	})
	return all, err
}

// Open selects an existing namespace, without regard to how the store was opened. NotFound if it doesn't exist.
func (n Namespaces) Open(namespace string) (*Names, error) {
	names, err := openNames(n.store, namespace)
	if err != nil {
		return nil, err
	}
	if there, err := n.exists(namespace); err != nil {
		return nil, err
	} else if !there {
		return nil, fmt.Errorf("namespace %s: %w", namespace, errdefs.ErrNotFound)
	}
	return names, nil
}

// removedSuffix ends the name of the directory of a namespace that is being removed.
const removedSuffix = ".removed"

// Delete removes an empty namespace. FailedPrecondition if it has names, containers, volumes or snapshots, or is the
// default one; NotFound if it doesn't exist.
func (n Namespaces) Delete(ctx context.Context, namespace string) error {
	removed := path.Join(layout.Namespaces, "."+namespace+removedSuffix)
	names, err := n.Open(namespace)
	if errdefs.IsNotFound(err) {
		_ = n.store.Tree.RemoveAll(removed) // left by an interrupted removal
	}
	if err != nil {
		return err
	}
	if namespace == DefaultNamespace {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "namespace %s is part of every store", namespace)
	}
	all, err := lockNamespaces(ctx, n.store, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer disk.Release(all)
	// Under this lock no name is added. A process that waits for it finds the directory gone, and creates the namespace
	// anew. The directory is renamed first, so that the namespace disappears at once.
	lock, err := names.dir.LockIndex(ctx, unix.LOCK_EX)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("lock names: %w", err)
	}
	err = n.moveAway(names, lock != nil, removed)
	if lock != nil {
		disk.Release(lock)
	}
	if err != nil {
		return err
	}
	tree := n.store.Tree
	events.Append(n.store.Root(), events.Event{Namespace: namespace, Topic: "/namespaces/delete", Name: namespace})
	_ = tree.RemoveDir(path.Join(containersDir, namespace))
	_ = tree.RemoveDir(path.Join(volumesDir, namespace))
	err = tree.RemoveAll(removed)
	if err != nil && !errors.Is(err, unix.ENOTEMPTY) { // NFS keeps a file that a reader has open; a later sweep removes it
		return fmt.Errorf("remove namespace %s: %w", namespace, err)
	}
	return nil
}

// moveAway renames the directory of an empty namespace durably. index says whether there is an index.json, which the
// caller has locked.
func (n Namespaces) moveAway(names *Names, index bool, to string) error {
	namespace, tree := names.namespace, n.store.Tree
	has, err := n.content(names, index)
	if err == nil && has != "" {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "namespace %s is not empty, it has %s", namespace, has)
	}
	if err == nil {
		err = tree.RemoveAll(to)
	}
	if err == nil {
		if err = tree.Rename(names.dir.Name, to); errors.Is(err, fs.ErrNotExist) { // another process removed it
			return fmt.Errorf("namespace %s: %w", namespace, errdefs.ErrNotFound)
		}
	}
	if err == nil {
		err = tree.SyncDir(layout.Namespaces)
	}
	if err != nil {
		return fmt.Errorf("remove namespace %s: %w", namespace, err)
	}
	return nil
}

// content returns something that the namespace has: an image, a container, a volume or a snapshot. It is "" for an
// empty namespace.
func (n Namespaces) content(names *Names, index bool) (string, error) {
	if index {
		ix, err := names.read()
		if err != nil {
			return "", err
		}
		if len(ix.Entries) > 0 {
			return "image " + ix.Entries[0].Name, nil
		}
	}
	ids, err := subdirs(n.store, path.Join(containersDir, names.namespace))
	if err != nil {
		return "", err
	}
	if len(ids) > 0 {
		return "container " + ids[0], nil
	}
	if ids, err = subdirs(n.store, path.Join(volumesDir, names.namespace)); err != nil {
		return "", err
	}
	if len(ids) > 0 {
		return "volume " + ids[0], nil
	}
	drivers, err := subdirs(n.store, snapshotsDir)
	if err != nil {
		return "", err
	}
	for _, driver := range drivers {
		ids, err := subdirs(n.store, path.Join(snapshotsDir, driver))
		if err != nil {
			return "", err
		}
		for _, id := range ids {
			b, err := n.store.Tree.ReadFile(path.Join(snapshotsDir, driver, id, "info"), maxRecord)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return "", err
			}
			var info struct {
				Key, Namespace string
			}
			// A snapshot with a torn record was never committed, and is in no namespace.
			if json.Unmarshal(b, &info) == nil && info.Namespace == names.namespace {
				return fmt.Sprintf("snapshot %.80q of %s", info.Key, driver), nil
			}
		}
	}
	return "", nil
}

// lockNamespaces is [layout.LockNamespaces].
func lockNamespaces(ctx context.Context, store *content.Store, how int) (*os.File, error) {
	f, err := layout.LockNamespaces(ctx, store.Tree, how)
	if err != nil {
		return nil, fmt.Errorf("lock namespaces: %w", err)
	}
	return f, nil
}

func (ix *index) labels() (map[string]string, error) {
	var labels map[string]string
	if raw, ok := ix.Fields["annotations"]; ok {
		if err := json.Unmarshal(raw, &labels); err != nil {
			return nil, errclass.Errorf(errdefs.ErrFailedPrecondition, "annotations of %s: %w", v1.ImageIndexFile, err)
		}
	}
	return labels, nil
}

func (ix *index) setLabels(changes map[string]string) (map[string]string, error) {
	labels, err := ix.labels()
	if err != nil {
		return nil, err
	}
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, changes)
	maps.DeleteFunc(labels, func(_, v string) bool { return v == "" })
	if len(labels) == 0 {
		delete(ix.Fields, "annotations")
		return labels, nil
	}
	if err := layout.CheckLabels(labels); err != nil {
		return nil, err
	}
	ix.Fields["annotations"], err = json.Marshal(labels)
	return labels, err
}

// create creates the layout if it doesn't exist. That of a namespace shares the store's blobs and its directory for
// temporary files. A namespace exists once it has an index.json.
func (n *Names) create(ctx context.Context) error {
	if n.dir.Name == "." {
		return n.store.Init()
	}
	if there, err := n.dir.Exists(); there || err != nil {
		return err
	}
	if err := n.store.Init(); err != nil {
		return err
	}
	lock, err := lockNamespaces(ctx, n.store, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer disk.Release(lock)
	made, err := n.make(nil)
	if made {
		n.logMade(nil)
	}
	return err
}

func (n *Names) logMade(labels map[string]string) {
	events.Append(n.store.Root(), events.Event{Namespace: n.namespace, Topic: "/namespaces/create", Name: n.namespace, Labels: labels})
}

// blobsOfStore is the text of the symbolic link blobs in a namespace.
const blobsOfStore = "../../" + v1.ImageBlobsDir

// make creates the directory and files of a namespace. made is false if the directory existed: another process is about
// to fill it, or died. labels are for a namespace that doesn't exist, so the caller must hold the lock of the
// namespaces exclusively.
func (n *Names) make(labels map[string]string) (made bool, err error) {
	tree := n.dir.Tree
	made = true
	if err = tree.MakeDir(layout.Namespaces); err == nil {
		err = tree.Mkdir(n.dir.Name, 0o777)
	}
	if errors.Is(err, fs.ErrExist) {
		made, err = false, nil
	}
	blobs := n.dir.File(v1.ImageBlobsDir)
	if err == nil {
		err = tree.Symlink(blobsOfStore, blobs)
	}
	if err == nil || errors.Is(err, fs.ErrExist) {
		if target, rerr := tree.Readlink(blobs); rerr != nil || target != blobsOfStore {
			return false, errclass.Errorf(errdefs.ErrFailedPrecondition, "create namespace %s: %s is not a symbolic link to %s", n.namespace, tree.Path(blobs), blobsOfStore)
		}
		err = nil
	}
	for _, dir := range []string{layout.Namespaces, "."} {
		if err == nil {
			err = tree.SyncDir(dir)
		}
	}
	if err == nil && len(labels) > 0 {
		err = n.dir.WriteEmptyIndex(labels)
	}
	if err == nil {
		err = n.dir.Create(layout.Ingest)
	}
	if err != nil {
		return false, fmt.Errorf("create namespace %s: %w", n.namespace, err)
	}
	return made, nil
}
