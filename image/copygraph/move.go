package copygraph

import (
	"context"
	"slices"
	"sync"

	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
)

// askAtOnce is the number of objects in one request to the target. Nearly every image has fewer.
const askAtOnce = 1024

// ask asks the target which objects it has. A remote isn't asked for referrers: it may have one without listing it,
// because the process that put it died before it changed the list. Putting it again adds it to the list.
func (c *Copy) ask(ctx context.Context) error {
	var wanted []*object
	for _, o := range c.objects {
		if o.landed {
			continue
		}
		if o.referrer != nil && o.referrer.to != "" && !c.intoStore() && !c.DryRun {
			continue
		}
		if o.wanted {
			wanted = append(wanted, o)
		} else if err := c.land(o, Foreign); err != nil {
			return err
		}
	}
	for chunk := range slices.Chunk(wanted, askAtOnce) {
		if err := c.askFor(ctx, chunk); err != nil {
			return err
		}
	}
	return nil
}

func (c *Copy) askFor(ctx context.Context, list []*object) error {
	var asked []Object
	for _, o := range list {
		for _, tag := range c.tags(o) {
			asked = append(asked, Object{tag, o.descriptor()})
		}
	}
	has, err := c.To.Has(ctx, asked)
	if err != nil {
		return err
	}
	for _, o := range list {
		all := true
		for range c.tags(o) {
			all, has = all && has[0], has[1:]
		}
		if !all {
			continue
		}
		if err := c.land(o, Exists); err != nil {
			return err
		}
	}
	return nil
}

// tags returns the tags under which the target is to have an object; "" means its digest.
func (c *Copy) tags(o *object) []string {
	var tags []string
	if o == c.root {
		tags = c.Tags
	}
	if o.referrer != nil && !c.intoStore() {
		tags = slices.Concat(tags, o.referrer.tags)
	}
	if o != c.root && len(tags) == 0 {
		return []string{""}
	}
	return tags
}

// bound returns an error if more than MaxBytes would move.
func (c *Copy) bound() error {
	t := c.Totals()
	if left := t.Bytes - t.LandedBytes; c.MaxBytes > 0 && left > c.MaxBytes {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "%d bytes would move, more than %d", left, c.MaxBytes)
	}
	return nil
}

// report records what would move.
func (c *Copy) report() error {
	for _, o := range c.objects {
		if o.landed {
			continue
		}
		if err := c.present(o); err != nil {
			return err
		}
		if err := c.land(o, Missing); err != nil {
			return err
		}
	}
	return nil
}

// present returns an error if the source is known not to have an object.
func (c *Copy) present(o *object) error {
	if c.From != nil || o.stored {
		return nil
	}
	return errclass.Errorf(errdefs.ErrNotFound, "%s is neither in the store nor at the target", o.digest)
}

// mount lets the target take missing blobs from other repositories that are known to have them.
func (c *Copy) mount(ctx context.Context) error {
	if c.Mount == nil {
		return nil
	}
	var list []*object
	for _, o := range c.objects {
		if !o.landed && !image.IsIndex(o.mediaType) && !image.IsManifest(o.mediaType) && c.Mount(o.digest) != "" {
			list = append(list, o)
		}
	}
	return c.parallel(ctx, list, func(ctx context.Context, o *object) error {
		done, err := c.To.Mount(ctx, o.descriptor(), c.Mount(o.digest))
		if err != nil || !done {
			return err
		}
		return c.land(o, Mounted)
	})
}

// turn orders concurrent requests to a source: each object is requested after the one before it. So a config isn't
// queued behind a layer, nor a layer behind those above it. The turn passes on when the object has been requested,
// needs no request, or waits for another process.
type turn struct {
	before <-chan struct{} // closed when the object before has passed the turn on
	pass   func()
}

// queue holds the objects that can move now, in the order of the documents.
type queue struct {
	ready chan *object
	mu    sync.Mutex
	last  <-chan struct{} // closed when the object that was taken last has passed the turn on
}

// take waits for the next object, and gives it a turn. It returns nil when all have moved.
func (q *queue) take(ctx context.Context) (*object, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	select {
	case o, ok := <-q.ready:
		if ok {
			before, passed := q.last, make(chan struct{})
			o.turn = &turn{before, sync.OnceFunc(func() {
				// An object may pass on a turn that it doesn't need yet, but not before its predecessors have passed it
				// on.
				go func() {
					_ = waitFor(ctx, before)
					close(passed)
				}()
			})}
			q.last = passed
		}
		return o, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// wait waits for the object's turn. The error is the context's.
func (o *object) wait(ctx context.Context) error {
	if o.turn == nil {
		return nil
	}
	return waitFor(ctx, o.turn.before)
}

// waitFor waits until a channel is closed. The error is the context's.
func waitFor(ctx context.Context, closed <-chan struct{}) error {
	select {
	case <-closed:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// pass passes the turn on to the next object.
func (o *object) pass() {
	if o.turn != nil {
		o.turn.pass()
	}
}

// move moves all objects that haven't landed, each after everything that it refers to.
func (c *Copy) move(ctx context.Context) error {
	left := 0
	for _, o := range c.objects {
		if !o.landed {
			left++
			continue
		}
		for _, p := range o.parents {
			p.pending--
		}
	}
	if left == 0 {
		return nil
	}
	first := make(chan struct{}) // the first object waits for nobody
	close(first)
	q := queue{ready: make(chan *object, left), last: first} // holds all objects
	for _, o := range c.objects {
		if !o.landed && o.pending == 0 {
			q.ready <- o
		}
	}
	var mu sync.Mutex // guards left and pending
	return c.work(ctx, func(ctx context.Context) error {
		for {
			o, err := q.take(ctx)
			if o == nil {
				return err
			}
			err = c.put(ctx, o)
			o.pass()
			o.turn = nil
			if err != nil {
				return err
			}
			mu.Lock()
			for _, p := range o.parents {
				if p.pending--; p.pending == 0 && !p.landed {
					q.ready <- p
				}
			}
			if left--; left == 0 {
				close(q.ready)
			}
			mu.Unlock()
		}
	})
}

// put moves an object, under each of its tags.
func (c *Copy) put(ctx context.Context, o *object) error {
	if err := c.present(o); err != nil {
		return err
	}
	outcome := Exists
	for _, tag := range c.tags(o) {
		got, err := c.putAs(ctx, o, tag)
		if err != nil {
			return err
		}
		if got == Stored {
			outcome = Stored
		}
	}
	return c.land(o, outcome)
}

// putAs moves an object under one tag.
func (c *Copy) putAs(ctx context.Context, o *object, tag string) (Outcome, error) {
	if c.intoStore() {
		return c.store(ctx, c.To, o)
	}
	var attempts retry
	for {
		r := c.reader(ctx, o)
		// The source is opened before the target is asked, and isn't reopened while the target takes the object.
		// Otherwise a goroutine that occupies the target could wait for its turn at the source behind a goroutine that
		// waits for the target.
		r.brittle = true
		var err error
		if to, ok := c.To.(Resumer); ok && tag == "" {
			r.offset, err = to.Part(ctx, Object{Descriptor: o.descriptor()})
		}
		if err == nil {
			err = r.open()
		}
		var outcome Outcome
		if err == nil {
			outcome, err = c.To.Put(ctx, Object{tag, o.descriptor()}, r)
		}
		if begin, end := r.end(); err == nil || !attempts.after(ctx, err, begin, end) {
			return outcome, err
		}
	}
}

// store moves an object to a store. If the source is a store too, it passes the blob's file on, so that a store on the
// same file system doesn't copy it.
func (c *Copy) store(ctx context.Context, to Target, o *object) (Outcome, error) {
	r := c.reader(ctx, o)
	defer r.end()
	from, ok := r.from.(fromStore)
	if !ok {
		return to.Put(ctx, Object{Descriptor: o.descriptor()}, r)
	}
	o.pass()
	f, err := from.File(o.digest)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return to.Put(ctx, Object{Descriptor: o.descriptor()}, f)
}

// expect counts an object, and reports it to Progress.
func (c *Copy) expect(o *object) {
	c.mu.Lock()
	c.totals.Objects++
	c.totals.Bytes += max(o.size, 0)
	c.mu.Unlock()
	if c.Progress != nil {
		c.Progress.Expect(o.descriptor())
	}
}

// land records that an object is done.
func (c *Copy) land(o *object, outcome Outcome) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if o.size < 0 || o.mediaType == "" && c.intoDocuments() { // unknown to the caller or the index
		d, err := image.Walker{Store: c.Documents}.Describe(context.Background(), o.digest)
		if err == nil {
			c.totals.Bytes += d.Size - max(o.size, 0)
			o.size, o.mediaType = d.Size, d.MediaType
		} else if !errdefs.IsNotFound(err) {
			return err
		}
	}
	o.landed = true
	c.totals.Landed++
	c.totals.LandedBytes += max(o.size, 0)
	if c.Progress != nil {
		c.Progress.Land(o.digest, outcome)
	}
	if _, isRoot := c.roots[o]; isRoot {
		c.roots[o] = outcome
	} else if c.Record != nil {
		if err := c.Record(o.descriptor(), outcome); err != nil {
			return err
		}
	}
	if o.check != nil {
		return o.check()
	}
	return nil
}

// parallel calls f with each object, several at a time.
func (c *Copy) parallel(ctx context.Context, list []*object, f func(context.Context, *object) error) error {
	next := make(chan *object, len(list))
	for _, o := range list {
		next <- o
	}
	close(next)
	return c.work(ctx, func(ctx context.Context) error {
		for o := range next {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := f(ctx, o); err != nil {
				return err
			}
		}
		return nil
	})
}

// work runs f in as many goroutines as objects may move concurrently, and waits for all of them. It returns the first
// error, which also ends the context of the others.
func (c *Copy) work(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var all sync.WaitGroup
	for range max(c.Jobs, 1) {
		all.Go(func() {
			if err := f(ctx); err != nil {
				cancel(err)
			}
		})
	}
	all.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return nil
}
