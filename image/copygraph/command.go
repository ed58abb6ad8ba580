package copygraph

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"distkit/batch"
	"distkit/errclass"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// How long a peer may take to end.
const (
	statusAfter = 10 * time.Second // after the end of its output
	endAfter    = 2 * time.Second  // when nothing more is wanted of a source
	storesAfter = 30 * time.Second // when a target has everything: it may still be storing
)

// process is a running peer and its requests.
type process struct {
	*batch.Client
	peer
	queued int64 // bytes that were requested and haven't arrived
	killed sync.Once
}

// kill ends the process. Reads from it and writes to it fail from then on, as do later requests.
func (p *process) kill() {
	p.killed.Do(func() {
		p.stop()
		p.Abort()
		_ = p.peer.Close()
	})
}

// failed returns the error of a request. If the process has ended, its exit error may have a better class.
func (p *process) failed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if p.Err() == nil {
		return err // concerns this request only
	}
	select {
	case <-p.ended():
	case <-time.After(statusAfter):
	}
	p.kill()
	<-p.ended()
	if exit := p.failure(); exit != nil && !errdefs.IsAborted(exit) && errdefs.IsAborted(err) {
		return exit
	}
	return err
}

// finish waits for the process to end, and kills it after patience. It returns the error of the process.
func (p *process) finish(patience time.Duration) error {
	dead := p.Err() != nil
	_ = p.Client.Close()
	select {
	case <-p.ended():
	case <-time.After(patience):
		p.kill()
		<-p.ended()
	}
	_ = p.peer.Close()
	if dead {
		return nil // the requests that failed reported it
	}
	return p.failure()
}

// command manages processes of a batch command. It starts one when it is needed, and another after one has died.
type command struct {
	start     func() (*process, error)
	most      int // maximum number of processes
	patience  time.Duration
	mu        sync.Mutex
	processes []*process
}

// worthAnother is the number of bytes queued at a process from which another one is started.
const worthAnother = 16 << 20

// pick returns the process with the fewest bytes queued. It counts the given bytes as queued there until giveBack is
// called.
func (c *command) pick(bytes int64) (p *process, giveBack func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	alive := c.processes[:0]
	for _, q := range c.processes {
		if q.Err() != nil {
			q.kill()
			continue
		}
		alive = append(alive, q)
		if p == nil || q.queued < p.queued {
			p = q
		}
	}
	c.processes = alive
	if p == nil || p.queued >= worthAnother && bytes >= worthAnother && len(alive) < c.most {
		if p, err = c.start(); err != nil {
			return nil, nil, err
		}
		c.processes = append(c.processes, p)
	}
	p.queued += bytes
	return p, func() {
		c.mu.Lock()
		p.queued -= bytes
		c.mu.Unlock()
	}, nil
}

// do calls f with a process, and kills the process if ctx ends. died reports whether the process has ended.
func (c *command) do(ctx context.Context, f func(*process) error) (died bool, err error) {
	p, _, err := c.pick(0)
	if err != nil {
		return false, err
	}
	defer context.AfterFunc(ctx, p.kill)()
	if err := f(p); err != nil {
		died = p.Err() != nil
		return died, p.failed(ctx, err)
	}
	return false, nil
}

// ask calls f with a process, and again after a temporary failure. A process that died is replaced. A process that
// lives has already retried itself, unless its own helper died (dist-remote(7)): so it gets one more attempt, for which
// it starts another helper.
func (c *command) ask(ctx context.Context, f func(*process) error) error {
	var attempts retry
	alive := 0
	for {
		died, err := c.do(ctx, f)
		if !died {
			alive++
		}
		if alive > 1 || !attempts.after(ctx, err, 0, 0) {
			return err
		}
	}
}

// Close lets the processes end, and returns their errors.
func (c *command) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var failed error
	for _, p := range c.processes {
		failed = errors.Join(failed, p.finish(c.patience))
	}
	c.processes = nil
	return failed
}

// maxFetchers bounds the number of processes of a source. A single pipe is slower than two processors.
const maxFetchers = 2

// CommandSource is a source served by a batch command or a Server.
type CommandSource struct {
	command
	fetch Fetch                    // for blobs; nil if they come in the frames of a batch
	slots chan struct{}            // limits concurrent fetches
	taken map[digest.Digest][]byte // documents fetched by Take
}

// Fetch returns the content of a blob. Its hints are those of a get in a batch. It verifies the content unless the
// target does.
type Fetch func(ctx context.Context, object string, hints ...string) (io.ReadCloser, error)

// FromCommand returns a source that runs a batch command with sh when something is first requested. If unverified is
// set, the target must hash the content. The caller must close the source.
func FromCommand(text string, unverified bool) *CommandSource {
	return source(func() (*process, error) { return startCommand(text, unverified) })
}

// FromServer returns a source served by s, which verifies what it sends unless the target does. If fetch is not nil, it
// fetches the blobs, [batch.Ahead] at a time: that saves the copying into frames. The caller must close the source.
func FromServer(s Server, fetch Fetch) *CommandSource {
	c := source(func() (*process, error) { return startServer(s) })
	c.fetch = fetch
	return c
}

func source(start func() (*process, error)) *CommandSource {
	return &CommandSource{
		command: command{start: start, most: maxFetchers, patience: endAfter},
		slots:   make(chan struct{}, batch.Ahead),
		taken:   map[digest.Digest][]byte{},
	}
}

// Start starts the command in advance.
func (c *CommandSource) Start() {
	go func() { _, _, _ = c.pick(0) }() // a failure shows in the first request
}

// Resolve returns the descriptor of a tag. The size is -1, because a registry's statement may be wrong. NotFound if the
// tag doesn't exist.
func (c *CommandSource) Resolve(ctx context.Context, tag string) (d v1.Descriptor, err error) {
	err = c.ask(ctx, func(p *process) error {
		var found bool
		if d, found, err = p.Has(ctx, tag); err == nil && !found {
			err = errclass.Errorf(errdefs.ErrNotFound, "the source has no such tag")
		}
		return err
	})
	return v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: -1}, resolving(tag, err)
}

// Take resolves a tag and fetches its document in one step. A later Open of the digest returns the fetched bytes.
func (c *CommandSource) Take(ctx context.Context, tag string) (d v1.Descriptor, err error) {
	err = c.ask(ctx, func(p *process) error {
		o, err := p.Fetch(ctx, tag)
		if err != nil {
			return err
		}
		b, err := io.ReadAll(io.LimitReader(o, image.MaxDocument+1))
		if err == nil && len(b) > image.MaxDocument {
			p.kill() // the rest isn't wanted
			err = errclass.Errorf(errdefs.ErrInvalidArgument, "a manifest or index can't have more than %d bytes", image.MaxDocument)
		}
		if err = errors.Join(err, o.Close()); err != nil {
			return err
		}
		d = v1.Descriptor{MediaType: o.MediaType, Digest: o.Digest, Size: int64(len(b))}
		if d.Digest == "" {
			d.Digest = digest.FromBytes(b)
		}
		c.taken[d.Digest] = b
		return nil
	})
	return d, resolving(tag, err)
}

func resolving(tag string, err error) error {
	if err != nil {
		return fmt.Errorf("resolve %s: %w", tag, err)
	}
	return nil
}

// maxReferrer bounds a descriptor in a list of referrers, with its annotations, in bytes.
const maxReferrer = 1 << 20

// Referrers returns the source's list. If there is a single artifact type, the source is asked for that type only.
// After a temporary failure the list starts over. DataLoss if the source sends something else than a list.
func (c *CommandSource) Referrers(artifactTypes ...string) ListReferrers {
	var hints []string
	if len(artifactTypes) == 1 {
		hints = append(hints, "artifacttype:"+artifactTypes[0])
	}
	return func(ctx context.Context, subject digest.Digest, f func(v1.Descriptor) error) error {
		return c.ask(ctx, func(p *process) error { return p.referrers(ctx, subject, hints, f) })
	}
}

// referrers calls f with each manifest of a list.
func (p *process) referrers(ctx context.Context, subject digest.Digest, hints []string, f func(v1.Descriptor) error) error {
	list, err := p.Referrers(ctx, subject, hints...)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(list)
	lines.Buffer(nil, maxReferrer)
	for err == nil && lines.Scan() {
		var d v1.Descriptor
		if d, err = image.ParseReferrer(lines.Bytes()); err != nil {
			err = errclass.As(err, errdefs.ErrDataLoss)
		} else {
			err = f(d)
		}
	}
	// An error of the list comes first: it may have cut the last line, which then isn't a descriptor.
	failed := lines.Err()
	if errors.Is(failed, bufio.ErrTooLong) {
		failed, err = nil, errclass.Errorf(errdefs.ErrDataLoss, "the list has a descriptor of more than %d bytes", maxReferrer)
	}
	if failed == nil && err != nil {
		p.kill() // the rest isn't wanted
	}
	_ = list.Close()
	return cmp.Or(failed, err)
}

// Open implements Source. It waits until everything requested before has arrived.
func (c *CommandSource) Open(ctx context.Context, d v1.Descriptor, offset int64, asked func()) (io.ReadCloser, error) {
	if b, ok := c.taken[d.Digest]; ok {
		return io.NopCloser(bytes.NewReader(b[min(offset, int64(len(b))):])), nil
	}
	if c.fetch != nil && d.MediaType != "" && !image.IsIndex(d.MediaType) && !image.IsManifest(d.MediaType) {
		return c.open(ctx, d, offset, asked)
	}
	p, giveBack, err := c.pick(max(d.Size-offset, 0))
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, p.kill)
	var o *batch.Object
	request, err := p.Request(string(d.Digest), hintsFrom(d, offset)...)
	if err == nil {
		asked()
		o, err = request.Wait(ctx)
	}
	if err != nil {
		giveBack()
		stop()
		if errdefs.IsDataLoss(err) {
			p.kill() // the process may continue with something that wasn't requested
		}
		return nil, p.failed(ctx, err)
	}
	return &fetched{ctx: ctx, o: o, p: p, release: func() { giveBack(); stop() }}, nil
}

// open fetches a blob with c.fetch.
func (c *CommandSource) open(ctx context.Context, d v1.Descriptor, offset int64, asked func()) (io.ReadCloser, error) {
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	asked()
	b := &fetchedBlob{ctx: ctx, release: sync.OnceFunc(func() { <-c.slots })}
	var err error
	if b.ReadCloser, err = c.fetch(ctx, string(d.Digest), hintsFrom(d, offset)...); err != nil {
		b.release()
		return nil, b.failed(err)
	}
	return b, nil
}

// fetchedBlob is a blob that comes by Fetch.
type fetchedBlob struct {
	io.ReadCloser
	ctx     context.Context
	release func()
}

func (b *fetchedBlob) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = b.failed(err)
	}
	return n, err
}

func (b *fetchedBlob) Close() error {
	defer b.release()
	return b.ReadCloser.Close()
}

// failed returns an error of Fetch with the class that it would have in a batch.
func (b *fetchedBlob) failed(err error) error {
	if b.ctx.Err() != nil {
		return context.Cause(b.ctx)
	}
	if errclass.Status(err) == errclass.Status(errdefs.ErrAborted) {
		err = errclass.As(err, errdefs.ErrAborted)
	}
	return err
}

// hintsFrom returns the hints for the content of an object from an offset on.
func hintsFrom(d v1.Descriptor, offset int64) []string {
	hints := batch.Hints(d)
	if offset > 0 {
		hints = append(hints, fmt.Sprint("offset:", offset))
	}
	return hints
}

// fetched is an object that comes from a process.
type fetched struct {
	ctx     context.Context
	o       *batch.Object
	p       *process
	ended   bool
	release func()
}

func (f *fetched) Read(b []byte) (int, error) {
	n, err := f.o.Read(b)
	if err != nil {
		f.ended = true
		if err != io.EOF {
			err = f.p.failed(f.ctx, err)
		}
	}
	return n, err
}

// Close closes the object. If it wasn't read to its end, Close kills the process, because the rest isn't wanted.
func (f *fetched) Close() error {
	if !f.ended {
		f.p.kill()
	}
	f.release()
	return f.o.Close()
}

// CommandTarget is a target served by a batch command or a Server.
type CommandTarget struct {
	command
	parts map[digest.Digest]int64 // how many bytes the target has of an object, or unasked; guarded by mu
}

// unasked means that the target may have more of the object than it last said.
const unasked = -1

// IntoCommand returns a target that runs a batch command with sh when it is first needed. The caller must close it and
// check the error, because a target may fail at its end.
func IntoCommand(text string) *CommandTarget {
	return target(func() (*process, error) { return startCommand(text, false) })
}

// IntoServer returns a target served by s. The caller must close it, as for [IntoCommand].
func IntoServer(s Server) *CommandTarget {
	return target(func() (*process, error) { return startServer(s) })
}

func target(start func() (*process, error)) *CommandTarget {
	return &CommandTarget{command{start: start, most: 1, patience: storesAfter}, map[digest.Digest]int64{}}
}

// Has implements Target. It sends all requests at once.
func (c *CommandTarget) Has(ctx context.Context, objects []Object) (has []bool, err error) {
	has = make([]bool, len(objects))
	var list []v1.Descriptor
	var positions, tagged []int
	for i, o := range objects {
		if o.Tag == "" {
			list, positions = append(list, o.Descriptor), append(positions, i)
		} else {
			tagged = append(tagged, i)
		}
	}
	err = c.ask(ctx, func(p *process) error {
		var all sync.WaitGroup
		failures := make([]error, len(tagged)+1)
		for k, i := range tagged {
			all.Go(func() {
				o := objects[i]
				d, ok, err := p.Has(ctx, o.Tag, batch.Hints(v1.Descriptor{MediaType: o.MediaType, Size: -1})...)
				if has[i] = ok && d.Digest == o.Digest; err != nil {
					failures[k] = fmt.Errorf("%s: %w", o.Tag, err)
				}
			})
		}
		all.Go(func() {
			got, err := p.HasAll(ctx, list, batch.Resume)
			for k, answer := range got {
				has[positions[k]] = answer.Word == "yes"
				c.notePart(list[k], answer)
			}
			failures[len(tagged)] = err
		})
		all.Wait()
		return errors.Join(failures...)
	})
	return has, err
}

// notePart records how many bytes of an object the target has.
func (c *CommandTarget) notePart(d v1.Descriptor, answer batch.Answer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.parts, d.Digest)
	if answer.Word == "part" && answer.Size > 0 && answer.Size <= d.Size {
		c.parts[d.Digest] = answer.Size
	}
}

// Part implements Resumer. It asks again if the target may have more of the object by now.
func (c *CommandTarget) Part(ctx context.Context, o Object) (int64, error) {
	if part := c.part(o.Digest); part != unasked {
		return part, nil
	}
	_, err := c.Has(ctx, []Object{o})
	return max(c.part(o.Digest), 0), err
}

func (c *CommandTarget) part(dgst digest.Digest) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.parts[dgst]
}

// Mount implements Target.
func (c *CommandTarget) Mount(ctx context.Context, d v1.Descriptor, repository string) (done bool, err error) {
	err = c.ask(ctx, func(p *process) error {
		if _, done, err = p.Mount(ctx, d.Digest, repository); err != nil {
			err = fmt.Errorf("%s from %s: %w", d.Digest, repository, err)
		}
		return err
	})
	return done, err
}

// Put implements Target. The next object is sent while the target stores this one.
func (c *CommandTarget) Put(ctx context.Context, o Object, r io.ReadSeeker) (outcome Outcome, err error) {
	name := o.Tag
	if name == "" {
		name = string(o.Digest)
	}
	begin, err := r.Seek(0, io.SeekCurrent)
	if err != nil {
		return "", err
	}
	_, err = c.do(ctx, func(p *process) error {
		got, err := p.Put(ctx, name, r, hintsFrom(o.Descriptor, begin)...)
		switch {
		case err != nil:
			c.mu.Lock()
			c.parts[o.Digest] = unasked
			c.mu.Unlock()
			return fmt.Errorf("%s: %w", name, err)
		case got.Digest != "" && got.Digest != o.Digest:
			return errclass.Errorf(errdefs.ErrDataLoss, "%s: the target has stored %s", o.Digest, got.Digest)
		}
		outcome = Outcome(got.Word)
		return nil
	})
	return outcome, err
}
