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

// Namespaces are the partitions of a store's names. The default one is always there; every
// other one is a directory below namespaces/, made by its first name or by Create.
type Namespaces struct {
	store *content.Store
}

// OpenNamespaces selects the namespaces of a store. It touches nothing on disk.
func OpenNamespaces(store *content.Store) Namespaces { return Namespaces{store} }

// List returns all namespaces, sorted: the default one, and those that have a layout.
// FailedPrecondition if one is a symbolic link, or has lost its index.json.
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

// exists reports whether List would return the namespace.
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

// Create makes a namespace with these labels. Of several that make it at once, one does; the others get AlreadyExists, as
// when it was there before. InvalidArgument: it is no identifier.
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

// Labels returns a namespace's labels: the annotations of its index. NotFound when there is
// no such namespace.
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

// SetLabels changes those labels of a namespace that are given; an empty value takes one away.
// It returns all.
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

// Open selects a namespace that exists, also if the store was opened by the directory of another one. NotFound if there is none.
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

// Delete removes a namespace that is empty. FailedPrecondition when it has names, containers, volumes or
// snapshots, or is the default one; NotFound when there is none.
func (n Namespaces) Delete(ctx context.Context, namespace string) error {
	gone := path.Join(layout.Namespaces, "."+namespace+removedSuffix)
	names, err := n.Open(namespace)
	if errdefs.IsNotFound(err) {
		_ = n.store.Tree.RemoveAll(gone) // an earlier removal may have been cut short
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
	// Under the lock nobody adds a name; who waits for it finds the directory gone and makes
	// the namespace anew. Renamed first, so that it goes at once and whole.
	lock, err := names.dir.LockIndex(ctx, unix.LOCK_EX)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("lock names: %w", err)
	}
	err = n.moveAway(names, lock != nil, gone)
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
	err = tree.RemoveAll(gone)
	if err != nil && !errors.Is(err, unix.ENOTEMPTY) { // NFS keeps a file that a reader has open; a sweep removes it
		return fmt.Errorf("remove namespace %s: %w", namespace, err)
	}
	return nil
}

// moveAway renames the directory of a namespace that is empty, durably. index says whether it has an index.json, which is
// locked.
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
		if err = tree.Rename(names.dir.Name, to); errors.Is(err, fs.ErrNotExist) { // another process was first
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

// content names one thing that a namespace has: an image, a container, a volume or a snapshot; "" if it is empty.
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
			// A snapshot whose record is torn was never committed, and has no namespace that it could show up in.
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
