package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync/atomic"

	"distkit/disk"
	"distkit/events"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Snapshotter gives access to the snapshots of one driver in a store, as one namespace sees them. A committed snapshot
// whose name is a digest is shared by all namespaces. Any other key belongs to its own namespace. Any number of
// goroutines and processes may call the methods at the same time.
//
// Error classes: NotFound, AlreadyExists, InvalidArgument, FailedPrecondition, Unavailable (busy) and DataLoss (damaged
// store). Errors of system calls keep theirs.
type Snapshotter struct {
	driver    Driver
	dir       string    // <root>/snapshots/<driver>, absolute
	files     disk.Tree // dir again, for access without following symbolic links
	namespace string
	noSync    bool
	options   Options
	whole     atomic.Bool // intact has found that the sample has lost no property
}

// Open opens the snapshots that the driver keeps in the store at root. Nothing is created before the first Prepare or
// View.
func Open(root string, d Driver, o Options) (*Snapshotter, error) {
	if o.Namespace == "" {
		o.Namespace = "default"
	}
	if err := checkNamespace(o.Namespace); err != nil {
		return nil, err
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	if err := checkLayout(root); err != nil {
		return nil, err
	}
	s := &Snapshotter{driver: d, dir: filepath.Join(root, "snapshots", d.Name()), namespace: o.Namespace, noSync: o.NoSync, options: o}
	s.files = disk.Tree(s.dir)
	if err := s.checkDirs(); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	f, err := s.files.Open("state")
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	defer f.Close()
	boot, _, err := parseState(f)
	if err != nil {
		return nil, err
	}
	if boot != bootID() {
		l, err := s.lock(context.Background())
		switch {
		case err == nil:
			l.unlock()
		case disk.Unwritable(err):
			// a store that can't be written to can still be read
		default:
			return nil, fmt.Errorf("recover store: %w", err)
		}
	}
	return s, nil
}

// checkLayout refuses a store whose layout version is not the one we know.
func checkLayout(root string) error {
	b, err := disk.Tree(root).ReadFile("oci-layout", 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	var layout struct {
		Version string `json:"imageLayoutVersion"`
	}
	if err := json.Unmarshal(b, &layout); err != nil || layout.Version != "1.0.0" {
		return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(
			"open store: %s/oci-layout is not of version 1.0.0: %.60q", root, b))
	}
	return nil
}

// Driver returns the driver's name.
func (s *Snapshotter) Driver() string { return s.driver.Name() }

// Prepare makes an active snapshot of the committed parent, or an empty one if parent is "", and returns its mounts.
// AlreadyExists: the key is in use. NotFound: there is no such parent. InvalidArgument: the parent is not committed.
// FailedPrecondition: the chain is longer than the driver can mount.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]Mount, error) {
	m, err := s.make(ctx, Active, key, parent, labels)
	if err != nil {
		return nil, fmt.Errorf("prepare %s: %w", key, err)
	}
	return m, nil
}

// View is like Prepare, but for a snapshot that is mounted read-only.
func (s *Snapshotter) View(ctx context.Context, key, parent string, labels map[string]string) ([]Mount, error) {
	m, err := s.make(ctx, View, key, parent, labels)
	if err != nil {
		return nil, fmt.Errorf("view %s: %w", key, err)
	}
	return m, nil
}

func (s *Snapshotter) make(ctx context.Context, kind Kind, key, parent string, labels map[string]string) ([]Mount, error) {
	if err := errors.Join(checkKey("key", key), checkLabels(labels)); err != nil {
		return nil, err
	}
	if err := s.checkAbsent(key); err != nil {
		return nil, err
	}
	if err := s.renew(ctx); err != nil {
		return nil, err
	}
	r := record{Namespace: s.namespace, Info: Info{Key: key, Kind: kind, Parent: parent, Labels: compact(labels), Created: now()}}
	r.Updated = r.Created
	if parent != "" {
		below, held, err := s.holdParent(ctx, parent)
		if err != nil {
			return nil, err
		}
		defer disk.Release(held)
		r.Parents = below
	}

	dir, held, err := s.scratch(ctx)
	if err != nil {
		return nil, err
	}
	defer disk.Release(held)
	published := false
	defer func() {
		if !published {
			_ = s.removeFiles(context.WithoutCancel(ctx), dir)
		}
	}()
	t := s.tree(0, r)
	t.Dir = dir
	if err := s.driver.Create(ctx, t); err != nil {
		return nil, err
	}
	step("filled")
	// Not synced, because what is written to the snapshot isn't either until it is committed.
	if err := disk.Tree(dir).Create("info", encode(r), 0o600, false); err != nil {
		return nil, err
	}
	step("written")
	if err := ctx.Err(); err != nil {
		return nil, err
	}

	l, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	id, err := s.publish(l, dir, r)
	l.unlock()
	if err != nil {
		return nil, err
	}
	published = true
	topic := "/snapshot/prepare"
	if kind == View {
		topic = "/snapshot/view"
	}
	s.log(r, events.Event{Topic: topic, Key: key, Parent: parent})
	return s.driver.Mounts(s.tree(id, r))
}

// log appends an event to the store's log, in the snapshot's namespace.
func (s *Snapshotter) log(r record, e events.Event) {
	e.Namespace, e.Snapshotter, e.Labels = r.Namespace, s.driver.Name(), r.Labels
	events.Append(filepath.Dir(filepath.Dir(s.dir)), e)
}

// publish gives a complete directory its id, and with it its key.
func (s *Snapshotter) publish(l *lock, dir string, r record) (uint64, error) {
	if err := s.checkAbsent(r.Key); err != nil {
		return 0, err
	}
	id, err := l.nextID()
	if err != nil {
		return 0, err
	}
	step("id taken")
	if err := s.index(r.Namespace, r.Key, id); err != nil {
		return 0, err
	}
	step("indexed")
	// Plain rename(2), since NFS, 9p and most of FUSE don't support flags. It never replaces another snapshot's
	// directory, because that is not empty.
	if err := os.Rename(dir, s.dirOf(id)); err != nil {
		return 0, fmt.Errorf("name directory %d: %w", id, err)
	}
	step("published")
	return id, nil
}

func (s *Snapshotter) checkAbsent(key string) error {
	switch e, err := s.lookup(key); {
	case err == nil:
		return taken(e.Kind)
	case errdefs.IsNotFound(err):
		return nil
	default:
		return err
	}
}

func taken(k Kind) error {
	return errdefs.ErrAlreadyExists.WithMessage(fmt.Sprintf("there is a snapshot of that name already (%s)", k))
}

// holdParent finds a committed parent, and locks it against removal until the returned file is closed. It also returns the
// ids for the parents of a child: the parent's own id, then those of its parents.
func (s *Snapshotter) holdParent(ctx context.Context, parent string) ([]uint64, *os.File, error) {
	for {
		e, err := s.parent(parent)
		if err != nil {
			return nil, nil, err
		}
		below := append([]uint64{e.id}, e.Parents...)
		if err := s.mountable(parent, below); err != nil {
			return nil, nil, err
		}
		f, err := lockFile(ctx, s.dirOf(e.id), unix.O_DIRECTORY, unix.LOCK_SH)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed by another process: the next lookup reports it
		}
		if err != nil {
			return nil, nil, fmt.Errorf("hold parent %s: %w", parent, err)
		}
		return below, f, nil
	}
}

// mountable returns FailedPrecondition if the driver can't mount that many layers below a snapshot.
func (s *Snapshotter) mountable(parent string, below []uint64) error {
	if n := s.driver.MaxParents(); n > 0 && len(below) > n {
		return errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf(
			"parent %s makes %d layers below, and %s mounts at most %d", parent, len(below), s.driver.Name(), n))
	}
	return nil
}

func (s *Snapshotter) parent(name string) (entry, error) {
	if err := checkKey("parent", name); err != nil {
		return entry{}, err
	}
	e, err := s.lookup(name)
	if isDigest(name) && (err != nil || e.Kind != Committed) {
		// Prefer the shared one over this namespace's unfinished snapshot of that name.
		if shared, serr := s.lookupIn("", name); serr == nil {
			e, err = shared, nil
		}
	}
	if err != nil {
		return e, fmt.Errorf("parent %s: %w", name, err)
	}
	if e.Kind != Committed {
		return e, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("parent %s is not committed (%s)", name, e.Kind))
	}
	return e, nil
}

// Mounts returns the mounts of an active snapshot or a view. FailedPrecondition: the snapshot is committed.
func (s *Snapshotter) Mounts(_ context.Context, key string) ([]Mount, error) {
	e, err := s.lookupIntact(key)
	if err == nil && e.Kind == Committed {
		err = errCommitted
	}
	if err == nil {
		var m []Mount
		if m, err = s.driver.Mounts(s.tree(e.id, e.record)); err == nil {
			return m, nil
		}
	}
	return nil, fmt.Errorf("mounts of %s: %w", key, err)
}

var errCommitted = errdefs.ErrFailedPrecondition.WithMessage("it is committed: make a view of it")

// Stat returns the description of a snapshot. FailedPrecondition: the store is a copy that has lost owners, modes or
// other properties of files; its snapshots can only be listed and removed.
func (s *Snapshotter) Stat(_ context.Context, key string) (Info, error) {
	e, err := s.lookupIntact(key)
	if err != nil {
		return Info{}, fmt.Errorf("stat %s: %w", key, err)
	}
	return e.Info, nil
}

// Usage measures the disk space that a snapshot takes. It looks at every file.
func (s *Snapshotter) Usage(ctx context.Context, key string) (Usage, error) {
	e, err := s.lookup(key)
	if err == nil {
		var u Usage
		if u, err = s.driver.Usage(ctx, s.tree(e.id, e.record)); err == nil {
			return u, nil
		}
	}
	return Usage{}, fmt.Errorf("usage of %s: %w", key, ofOthers(err))
}

// Walk calls f for each snapshot that the namespace sees, parents before children. It stops at the first error of f and
// returns it. f may call methods of the Snapshotter. If records are damaged, Walk returns DataLoss after the others.
func (s *Snapshotter) Walk(ctx context.Context, f func(context.Context, Info) error) error {
	all, damaged := s.entries()
	if damaged != nil {
		damaged = fmt.Errorf("list snapshots: %w", damaged)
	}
	// Ids are not enough: Commit can give a snapshot a parent with a higher id.
	sort.SliceStable(all, func(i, j int) bool { return len(all[i].Parents) < len(all[j].Parents) })
	for _, e := range all {
		if e.Namespace != "" && e.Namespace != s.namespace {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := f(ctx, e.Info); err != nil {
			return err
		}
	}
	return damaged
}

// Update sets the labels of the snapshot info.Key to info.Labels. With field paths of the form "labels.NAME" it changes
// only those labels; an empty value deletes one. Any other path except "labels" is InvalidArgument.
func (s *Snapshotter) Update(ctx context.Context, info Info, fieldpaths ...string) (i Info, err error) {
	err = retry(func() error {
		i, err = s.update(ctx, info, fieldpaths)
		return err
	})
	if err != nil {
		return Info{}, fmt.Errorf("update %s: %w", info.Key, err)
	}
	return i, nil
}

func (s *Snapshotter) update(ctx context.Context, info Info, fieldpaths []string) (Info, error) {
	if err := checkLabels(info.Labels); err != nil {
		return Info{}, err
	}
	e, err := s.lookup(info.Key)
	if err != nil {
		return Info{}, err
	}
	r := e.record
	if len(fieldpaths) == 0 {
		fieldpaths = []string{"labels"}
	}
	r.Labels = maps.Clone(e.Labels)
	for _, p := range fieldpaths {
		name, one := strings.CutPrefix(p, "labels.")
		switch {
		case p == "labels":
			r.Labels = maps.Clone(info.Labels)
		case one && info.Labels[name] == "":
			delete(r.Labels, name)
		case one:
			if r.Labels == nil {
				r.Labels = map[string]string{}
			}
			r.Labels[name] = info.Labels[name]
		default:
			return Info{}, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("field %q can't be changed: only labels can", p))
		}
	}
	r.Labels = compact(r.Labels)
	if err := s.replace(ctx, e, r, func() error { return nil }); err != nil {
		return Info{}, err
	}
	s.log(r, events.Event{Topic: "/snapshot/update", Key: r.Key})
	return s.Stat(context.Background(), info.Key)
}

// compact drops labels without a value: setting an empty value deletes a label.
func compact(labels map[string]string) map[string]string {
	var out map[string]string
	for k, v := range labels {
		if v != "" {
			if out == nil {
				out = map[string]string{}
			}
			out[k] = v
		}
	}
	return out
}
