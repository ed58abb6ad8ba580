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

// Create makes a namespace with these labels. AlreadyExists when it is there, InvalidArgument
// when it is no identifier.
func (n Namespaces) Create(ctx context.Context, namespace string, labels map[string]string) error {
	names, err := openNames(n.store, namespace)
	if err != nil {
		return err
	}
	if there, err := n.exists(namespace); err != nil {
		return err
	} else if there {
		return fmt.Errorf("namespace %s: %w", namespace, errdefs.ErrAlreadyExists)
	}
	if err := names.change(ctx, func(ix *index) error { return ix.setLabels(labels) }); err != nil {
		// It may be there already, without its labels, if nobody else has used it since.
		_ = n.Delete(context.WithoutCancel(ctx), namespace)
		return err
	}
	return nil
}

// Labels returns a namespace's labels: the annotations of its index. NotFound when there is
// no such namespace.
func (n Namespaces) Labels(namespace string) (map[string]string, error) {
	names, err := n.open(namespace)
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
	names, err := n.open(namespace)
	if err != nil {
		return nil, err
	}
	var all map[string]string
	err = names.change(ctx, func(ix *index) error {
		if err := ix.setLabels(labels); err != nil {
			return err
		}
		all, err = ix.labels()
		return err
	})
	return all, err
}

func (n Namespaces) open(namespace string) (*Names, error) {
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

// Delete removes a namespace that is empty. FailedPrecondition when it has names or
// containers, or is the default one; NotFound when there is none.
func (n Namespaces) Delete(ctx context.Context, namespace string) error {
	gone := path.Join(layout.Namespaces, "."+namespace+".removed")
	names, err := n.open(namespace)
	if errdefs.IsNotFound(err) {
		_ = n.store.Tree.RemoveAll(gone) // an earlier removal may have been cut short
	}
	if err != nil {
		return err
	}
	if namespace == DefaultNamespace {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "namespace %s is part of every store", namespace)
	}
	tree := n.store.Tree
	containers := path.Join("containers", namespace)
	ids, err := subdirs(n.store, containers)
	if err != nil {
		return fmt.Errorf("remove namespace %s: %w", namespace, err)
	}
	if len(ids) > 0 {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "namespace %s is not empty, it has container %s", namespace, ids[0])
	}
	all, err := lockNamespaces(n.store, unix.LOCK_EX)
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
	if lock != nil {
		defer disk.Release(lock)
		ix, err := names.read()
		if err != nil {
			return err
		}
		if len(ix.Entries) > 0 {
			return errclass.Errorf(errdefs.ErrFailedPrecondition, "namespace %s is not empty, it has image %s",
				namespace, ix.Entries[0].Name)
		}
	}
	if err := tree.RemoveAll(gone); err != nil {
		return fmt.Errorf("remove namespace %s: %w", namespace, err)
	}
	switch err := tree.Rename(names.dir.Name, gone); {
	case errors.Is(err, fs.ErrNotExist): // another process was first
		return fmt.Errorf("namespace %s: %w", namespace, errdefs.ErrNotFound)
	case err != nil:
		return fmt.Errorf("remove namespace %s: %w", namespace, err)
	}
	if err := tree.SyncDir(layout.Namespaces); err != nil {
		return fmt.Errorf("remove namespace %s: %w", namespace, err)
	}
	events.Append(n.store.Root(), events.Event{Namespace: namespace, Topic: "/namespaces/delete", Name: namespace})
	_ = tree.RemoveDir(containers)
	if err := tree.RemoveAll(gone); err != nil {
		return fmt.Errorf("remove namespace %s: %w", namespace, err)
	}
	return nil
}

// lockNamespaces locks the directory of all namespaces: shared by those who make one, held
// alone by who removes one, and by a sweep.
func lockNamespaces(store *content.Store, how int) (*os.File, error) {
	if err := store.Tree.MakeDir(layout.Namespaces); err != nil {
		return nil, fmt.Errorf("create namespace: %w", err)
	}
	f, err := store.Tree.OpenDir(layout.Namespaces)
	if err == nil {
		if err = disk.Lock(f, how); err != nil {
			f.Close()
		}
	}
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

func (ix *index) setLabels(changes map[string]string) error {
	labels, err := ix.labels()
	if err != nil {
		return err
	}
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, changes)
	maps.DeleteFunc(labels, func(_, v string) bool { return v == "" })
	if len(changes) > 0 {
		ix.events = append(ix.events, events.Event{Topic: "/namespaces/update", Labels: labels})
	}
	if len(labels) == 0 {
		delete(ix.Fields, "annotations")
		return nil
	}
	ix.Fields["annotations"], err = json.Marshal(labels)
	return err
}
