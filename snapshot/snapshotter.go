package snapshot

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync/atomic"

	"distkit/disk"
	"distkit/disk/sys"
	"distkit/events"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Snapshotter is a store's snapshots of one driver, as one namespace sees them. A committed
// snapshot whose name is a digest is the same in all namespaces; every other key belongs to
// its own. Its methods may be called by any number of goroutines and processes at once.
//
// Errors are of the classes NotFound, AlreadyExists, InvalidArgument, FailedPrecondition,
// Unavailable (busy) and DataLoss (a damaged store), besides those of the system.
type Snapshotter struct {
	driver    Driver
	dir       string    // <root>/snapshots/<driver>, absolute
	files     disk.Tree // dir
	namespace string
	noSync    bool
	options   Options
	whole     atomic.Bool // the sample has lost nothing
}

// Open opens the snapshots that the driver keeps in the store at root. Nothing is created
// before the first Prepare or View.
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
			// It can be read as it is.
		default:
			return nil, fmt.Errorf("recover store: %w", err)
		}
	}
	return s, nil
}

// checkLayout refuses a store of a later layout, as all who use one must.
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

// Driver is the driver's name.
func (s *Snapshotter) Driver() string { return s.driver.Name() }

// Prepare makes an Active snapshot of the committed parent, or an empty one where parent is
// "", and returns its mounts. AlreadyExists if the key is taken, NotFound without such a
// parent, InvalidArgument where the parent is not committed, FailedPrecondition where it has
// more snapshots below than the driver can mount.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, labels map[string]string) ([]Mount, error) {
	m, err := s.make(ctx, Active, key, parent, labels)
	if err != nil {
		return nil, fmt.Errorf("prepare %s: %w", key, err)
	}
	return m, nil
}

// View is Prepare for a snapshot that is mounted read-only.
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
	if err := s.absent(key); err != nil {
		return nil, err
	}
	if err := s.renew(ctx); err != nil {
		return nil, err
	}
	r := record{Namespace: s.namespace, Info: Info{Key: key, Kind: kind, Parent: parent, Labels: compact(labels), Created: now()}}
	r.Updated = r.Created
	if parent != "" {
		below, held, err := s.hold(ctx, parent)
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
	// Nothing is synced: what is written to the snapshot isn't either, before it is committed.
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

// log appends an event of the snapshot's namespace to the store's log.
func (s *Snapshotter) log(r record, e events.Event) {
	e.Namespace, e.Snapshotter, e.Labels = r.Namespace, s.driver.Name(), r.Labels
	events.Append(filepath.Dir(filepath.Dir(s.dir)), e)
}

// publish gives a complete directory its id, and with that its key.
func (s *Snapshotter) publish(l *lock, dir string, r record) (uint64, error) {
	if err := s.absent(r.Key); err != nil {
		return 0, err
	}
	id, err := l.take()
	if err != nil {
		return 0, err
	}
	step("id taken")
	if err := s.index(r.Namespace, r.Key, id); err != nil {
		return 0, err
	}
	step("indexed")
	// Without flags, which NFS, 9p and most of FUSE don't know: no snapshot's directory is ever empty, and
	// rename(2) replaces no other.
	if err := os.Rename(dir, s.dirOf(id)); err != nil {
		return 0, fmt.Errorf("name directory %d: %w", id, err)
	}
	step("published")
	return id, nil
}

func (s *Snapshotter) absent(key string) error {
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

// hold finds a parent and keeps it from being removed until the file is closed. It returns
// the ids of what will lie below a child: the parent's own, then those of its parents.
func (s *Snapshotter) hold(ctx context.Context, parent string) ([]uint64, *os.File, error) {
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
			continue // removed meanwhile: says so the next time round
		}
		if err != nil {
			return nil, nil, fmt.Errorf("hold parent %s: %w", parent, err)
		}
		return below, f, nil
	}
}

// mountable returns FailedPrecondition if a parent and those below it are more than the driver can mount below a snapshot.
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
		// The committed one of that name is everybody's.
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

// Commit turns the active snapshot key into the committed one called name. It is atomic: at
// every instant there is the one or the other. And it is durable: the files are on the disk
// before the name appears. AlreadyExists if the name is taken, and the active one stays;
// NotFound without such a key; InvalidArgument where it is a view.
//
// With [CommitOptions.Settle] the files become what the layer is on top of the parent first.
//
// Unavailable while it is mounted (in this process's mount namespace) or another process mounts, commits or
// removes it: what is written to it afterwards would change what is to stay as it is. See [CommitOptions.Mounted].
func (s *Snapshotter) Commit(ctx context.Context, name, key string, o CommitOptions) error {
	if err := retry(func() error { return s.commit(ctx, name, key, &o) }); err != nil {
		return fmt.Errorf("commit %s: %w", name, err)
	}
	return nil
}

// errChanged is what a change meets that another process was quicker than.
var errChanged = errors.New("changed meanwhile")

func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, errChanged) {
			return err
		}
	}
}

// unsettled is the file in a snapshot's directory that is there from the beginning of settling
// to its end.
const unsettled = "unsettled"

// settle has the driver change the files, once.
func (s *Snapshotter) settle(ctx context.Context, t Tree, unresolved io.Reader) error {
	if err := disk.Tree(t.Dir).WriteFile(unsettled, nil, 0o600); err != nil {
		return err
	}
	step("settle begins")
	if err := s.driver.Settle(ctx, t, unresolved); err != nil {
		return err
	}
	step("settled")
	return os.Remove(filepath.Join(t.Dir, unsettled))
}

func (s *Snapshotter) commit(ctx context.Context, name, key string, o *CommitOptions) error {
	c, err := s.ready(ctx, name, key, o, nil)
	if err != nil {
		return err
	}
	defer c.release()
	if err := s.sync(); err != nil {
		return fmt.Errorf("sync %s: %w", key, err)
	}
	return s.publishCommit(ctx, c)
}

// A commitment is an active snapshot that can be committed once its files are on the disk: nobody else uses it, and they are settled.
type commitment struct {
	entry
	to    record       // what it becomes
	below *commitment  // its parent, if that was not committed yet
	free  func() error // AlreadyExists if the name is taken
	held  []*os.File   // locks of the snapshot and its parent
}

func (c *commitment) release() {
	for _, f := range c.held {
		disk.Release(f)
	}
	c.held = nil
}

// ready locks the snapshot key, checks that it can be committed as name, and settles it. With below, that is its parent.
func (s *Snapshotter) ready(ctx context.Context, name, key string, o *CommitOptions, below *commitment) (_ *commitment, err error) {
	if err := errors.Join(checkKey("name", name), checkLabels(o.Labels)); err != nil {
		return nil, err
	}
	e, err := s.lookup(key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	if err := s.intact(); err != nil {
		return nil, err
	}
	if e.Kind != Active {
		return nil, errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf("%s is not active (%s)", key, e.Kind))
	}
	held, err := s.use(e, unix.LOCK_EX)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	c := &commitment{entry: e, to: e.record, below: below, held: []*os.File{held}}
	defer func() {
		if err != nil {
			c.release()
		}
	}()
	if is, err := s.read(e.id); err != nil || !bytes.Equal(is.raw, e.raw) {
		return nil, cmp.Or(err, errChanged)
	}
	if !o.Mounted {
		if err := s.unmounted(e); err != nil {
			return nil, fmt.Errorf("%s: %w: unmount it first", key, err)
		}
	}
	if isDigest(name) {
		c.to.Namespace = ""
	}
	c.free = func() error {
		if name != key {
			return s.absent(name)
		}
		if c.to.Namespace != e.Namespace {
			if _, err := s.lookupIn(c.to.Namespace, name); !errors.Is(err, fs.ErrNotExist) {
				return cmp.Or(err, taken(Committed))
			}
		}
		return nil
	}
	if err := c.free(); err != nil {
		return nil, err
	}
	if o.Settle != nil && e.Parent != "" {
		return nil, errdefs.ErrFailedPrecondition.WithMessage(key + " was prepared from a parent: there is nothing to settle")
	}
	c.to.Info = Info{Key: name, Kind: Committed, Parent: e.Parent, Labels: compact(o.Labels)}
	if o.Parent != "" && o.Parent != e.Parent {
		switch {
		case e.Parent != "":
			return nil, errdefs.ErrFailedPrecondition.WithMessage(fmt.Sprintf("%s was prepared from %s, not from %s", key, e.Parent, o.Parent))
		case s.driver.Whiteouts(s.dir) == "":
			return nil, errdefs.ErrNotImplemented.WithMessage(fmt.Sprintf("%s can't give a snapshot a parent when it is committed", s.driver.Name()))
		}
		c.to.Parent = o.Parent
		if below != nil {
			c.to.Parents = append([]uint64{below.id}, below.to.Parents...)
			if err := s.mountable(o.Parent, c.to.Parents); err != nil {
				return nil, err
			}
		} else {
			var held *os.File
			if c.to.Parents, held, err = s.hold(ctx, o.Parent); err != nil {
				return nil, err
			}
			c.held = append(c.held, held)
		}
	}

	if _, err := os.Lstat(filepath.Join(s.dirOf(e.id), unsettled)); err == nil {
		return nil, errdefs.ErrFailedPrecondition.WithMessage(key + " could not be settled: apply the layer again, on its mounted parent")
	}
	if o.Settle != nil {
		if err := s.settle(ctx, s.tree(e.id, c.to), o.Settle); err != nil {
			return nil, fmt.Errorf("settle %s: %w", key, err)
		}
		o.Settle = nil
	}
	if a, ok := s.driver.(Archiver); ok {
		if err := a.Archive(ctx, s.tree(e.id, e.record), s.options.Diff); err != nil {
			return nil, fmt.Errorf("archive %s: %w", key, err)
		}
		step("archived")
	}
	return c, nil
}

// sync puts the files of all snapshots on the disk.
func (s *Snapshotter) sync() error {
	if s.noSync {
		return nil
	}
	d, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return sys.Syncfs(int(d.Fd()))
}

// publishCommit gives a snapshot, whose files are on the disk, its new record. FailedPrecondition if its parent has become another
// one than it was settled for.
func (s *Snapshotter) publishCommit(ctx context.Context, c *commitment) error {
	step("synced")
	if err := ctx.Err(); err != nil {
		return err
	}
	if c.below != nil {
		below, held, err := s.hold(ctx, c.to.Parent)
		if err != nil {
			return err
		}
		c.held = append(c.held, held)
		if !slices.Equal(below, c.to.Parents) {
			return errdefs.ErrFailedPrecondition.WithMessage("parent " + c.to.Parent + " was made by another process meanwhile")
		}
	}
	err := s.replace(ctx, c.entry, c.to, func() error {
		if err := c.free(); err != nil || c.to.Key == c.Key && c.to.Namespace == c.Namespace {
			return err
		}
		return s.index(c.to.Namespace, c.to.Key, c.id)
	})
	if err == nil {
		s.log(c.to, events.Event{Topic: "/snapshot/commit", Key: c.Key, Name: c.to.Key, Parent: c.to.Parent})
		if a, ok := s.driver.(Archiver); ok {
			_ = a.Committed(s.tree(c.id, c.to)) // what is left goes with the snapshot
		}
	}
	return err
}

// replace puts r in the place of e's record, if that still is what it was. The record is
// written and synced aside; check is called under the lock, before it takes its place.
func (s *Snapshotter) replace(ctx context.Context, e entry, r record, check func() error) error {
	dir, held, err := s.scratch(ctx)
	if err != nil {
		return err
	}
	defer disk.Release(held)
	defer os.RemoveAll(dir)
	r.Updated = now()
	if r.Created.IsZero() {
		r.Created = r.Updated
	}
	if err := disk.Tree(dir).Create("info", encode(r), 0o600, !s.noSync); err != nil {
		return err
	}
	step("record written")
	if err := func() error {
		l, err := s.lock(ctx)
		if err != nil {
			return err
		}
		defer l.unlock()
		is, err := s.read(e.id)
		if err != nil || !bytes.Equal(is.raw, e.raw) {
			return errChanged
		}
		if err := check(); err != nil {
			return err
		}
		step("indexed")
		if err := os.Rename(filepath.Join(dir, "info"), filepath.Join(s.dirOf(e.id), "info")); err != nil {
			return err
		}
		step("renamed")
		if r.Key != e.Key || r.Namespace != e.Namespace {
			s.unindex(e.Namespace, e.Key)
		}
		return nil
	}(); err != nil {
		return err
	}
	return s.syncDir(s.dirOf(e.id))
}

// Mounts returns the mounts of an active snapshot or a view; FailedPrecondition where it is
// committed.
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

// delete deletes the files of snapshots that were detached, of which none is another's parent.
// Once ctx is done, the files are left in tmp/ for the next sweep.
func (s *Snapshotter) delete(ctx context.Context, list []*removal) {
	// Were a name to come back after a power failure, files would be missing below it. Of one that isn't committed nobody has been
	// promised any.
	var unsynced error
	if slices.ContainsFunc(list, func(r *removal) bool { return r.held != nil && r.Kind == Committed }) {
		unsynced = s.syncDir(s.dir, filepath.Join(s.dir, "tmp"))
	}
	for _, r := range list {
		if r.held == nil {
			continue
		}
		if r.Kind == Committed {
			r.failed = unsynced
		}
		if r.failed == nil {
			step("detached")
			s.log(r.record, events.Event{Topic: "/snapshot/remove", Key: r.Key})
			if ctx.Err() == nil {
				r.failed = ofOthers(s.removeFiles(ctx, r.dir))
			}
		}
		disk.Release(r.held)
	}
}

// ofOthers explains a failure with files that have, or whose directories have, other owners. Root without capabilities fails so, too.
// What is left of a removed snapshot waits in tmp/ for somebody who can delete it.
func ofOthers(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return errdefs.ErrPermissionDenied.WithMessage("it has files of other users: only root, or root of the user namespace it was made in, can delete them (CAP_DAC_OVERRIDE)")
	}
	return err
}

// detach takes a snapshot's name away, and leaves its directory locked in tmp/. It fails as childless does if the snapshot has
// children. known may be nil for a snapshot that is not committed: only committed ones have children.
func (s *Snapshotter) detach(ctx context.Context, e entry, known *family) (string, *os.File, error) {
	held, err := s.use(e, unix.LOCK_EX)
	if err != nil {
		return "", nil, err
	}
	detached := false
	defer func() {
		if !detached {
			disk.Release(held)
		}
	}()
	l, err := s.lock(ctx)
	if err != nil {
		return "", nil, err
	}
	defer l.unlock()
	is, err := s.read(e.id)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !bytes.Equal(is.raw, e.raw) {
		return "", nil, errChanged
	}
	if err != nil {
		return "", nil, err
	}
	if e.Kind == Committed {
		// Before the mounts: a mounted child makes its parent's files mounted.
		if err := s.childless(e, known, l); err != nil {
			return "", nil, err
		}
	}
	if err := s.unmounted(e); err != nil {
		return "", nil, err
	}
	step("not mounted")
	dir := filepath.Join(s.dir, "tmp", filepath.Base(s.dirOf(e.id)))
	if err := os.Rename(s.dirOf(e.id), dir); err != nil {
		return "", nil, err
	}
	detached = true
	if known != nil {
		known.remove(e)
	}
	step("renamed away")
	s.unindex(e.Namespace, e.Key)
	return dir, held, nil
}

// Stat returns what is known of a snapshot. FailedPrecondition if the snapshots are a copy that has lost owners, modes or
// other properties of their files: then they can only be listed and removed.
func (s *Snapshotter) Stat(_ context.Context, key string) (Info, error) {
	e, err := s.lookupIntact(key)
	if err != nil {
		return Info{}, fmt.Errorf("stat %s: %w", key, err)
	}
	return e.Info, nil
}

// Usage measures what a snapshot takes on the disk, by looking at each of its files.
func (s *Snapshotter) Usage(ctx context.Context, key string) (Usage, error) {
	e, err := s.lookup(key)
	if err == nil {
		var u Usage
		if u, err = s.driver.Usage(ctx, s.tree(e.id, e.record)); err == nil {
			return u, nil
		}
	}
	return Usage{}, fmt.Errorf("usage of %s: %w", key, err)
}

// Walk calls f for each snapshot that the namespace sees, parents before their children. It
// ends with f's error, if that returns one. f may call the Snapshotter's methods. DataLoss, at the
// end, if the records of some are damaged.
func (s *Snapshotter) Walk(ctx context.Context, f func(context.Context, Info) error) error {
	all, damaged := s.entries()
	if damaged != nil {
		damaged = fmt.Errorf("list snapshots: %w", damaged)
	}
	// Ids order what has parents, but for what was given its parent by Commit.
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

// Update changes a snapshot's labels to those of info, whose Key says which snapshot is
// meant: all of them, or with field paths of the form "labels.NAME" those alone, where an
// empty value takes the label away. Other paths than these and "labels" are InvalidArgument.
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

// compact drops labels without a value, which is how a label is taken away.
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
