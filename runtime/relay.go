package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"sync/atomic"
	"time"

	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
)

// Streams says what the standard streams of a process in the foreground are.
type Streams int

const (
	// Piped gives the process pipes. What this process's own standard streams are, it can't
	// own, reopen or truncate.
	Piped Streams = iota
	// Inherited gives the process this process's own standard streams. It can do to them
	// whatever their owner can; the runtime gives them to the user that the process runs as.
	Inherited
)

// inherited is the runc.IO of [Inherited].
type inherited struct{ runc.IO }

func (inherited) Set(c *exec.Cmd) { c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr }

const (
	relayRoom = 256 << 10       // of a pipe; every user has some 64 MiB for all pipes
	lingering = time.Second     // how long others may print that a process has left behind
	wary      = 64 << 10        // what is taken from a pipe only once the process has read it
	checkEach = time.Second / 2 // how often a background job looks whether it is in the foreground
)

// relay stands between a process's standard streams, which are pipes, and this process's. Bytes are moved by
// splice(2) where the kernel can. The flags of this process's streams are not changed.
type relay struct {
	runc.IO
	ours    [3]int      // this process's
	theirs  [3]*os.File // the process's own ends
	input   int         // our end of its input
	outputs []*flow
	stop    *latch // closed when the process has ended
	fed     chan error
	begun   bool
}

// newRelay makes the pipes, and begins to copy what the process prints to two of these descriptors.
func newRelay(ours [3]int) (*relay, error) {
	r := &relay{ours: ours, fed: make(chan error, 1), input: -1}
	err := func() (err error) {
		if r.stop, err = newLatch(); err != nil {
			return err
		}
		if r.theirs[0], r.input, err = newPipe(false); err != nil {
			return err
		}
		for i := 1; i <= 2; i++ {
			// What is one file stays one, so that lines keep their order.
			if i == 2 && sameOutput(r.ours[1], r.ours[2]) {
				r.theirs[2] = r.theirs[1]
				break
			}
			theirs, from, err := newPipe(true)
			if err != nil {
				return err
			}
			r.theirs[i] = theirs
			r.outputs = append(r.outputs, &flow{from: from, to: r.ours[i], stop: r.stop, done: make(chan struct{})})
		}
		return nil
	}()
	if err != nil {
		r.closeTheirs()
		return nil, fmt.Errorf("pipes for the standard streams: %w", err)
	}
	for _, f := range r.outputs {
		go f.deliver()
	}
	return r, nil
}

// newPipe makes a pipe, of which the process is to have the one end and we the other.
func newPipe(output bool) (theirs *os.File, ours int, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, -1, err
	}
	if output {
		p[0], p[1] = p[1], p[0]
		_ = unix.SetNonblock(p[1], true)
		_, _ = unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, relayRoom) // else as large as it is
	}
	return os.NewFile(uintptr(p[0]), "pipe"), p[1], nil
}

// sameOutput reports whether two descriptors write to one place: they share an offset, or there is none.
func sameOutput(a, b int) bool {
	const file = 0 // KCMP_FILE
	pid := uintptr(os.Getpid())
	if r, _, errno := unix.Syscall6(unix.SYS_KCMP, pid, pid, file, uintptr(a), uintptr(b), 0); errno == 0 && r == 0 {
		return true
	}
	var sa, sb unix.Stat_t
	if unix.Fstat(a, &sa) != nil || unix.Fstat(b, &sb) != nil || sa.Dev != sb.Dev || sa.Ino != sb.Ino {
		return false
	}
	appends := func(fd int) bool {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		return err == nil && flags&unix.O_APPEND != 0
	}
	return sa.Mode&unix.S_IFMT != unix.S_IFREG || appends(a) && appends(b)
}

// Set gives the process its streams: relay is the runc.IO of its making.
func (r *relay) Set(c *exec.Cmd) { c.Stdin, c.Stdout, c.Stderr = r.theirs[0], r.theirs[1], r.theirs[2] }

func (r *relay) closeTheirs() {
	for i, f := range r.theirs {
		if f != nil && (i == 0 || f != r.theirs[i-1]) {
			_ = f.Close()
		}
	}
}

// begin is called once the process runs: it is given its input from now on, and nothing is taken from
// this process's standard input before.
func (r *relay) begin() {
	r.begun = true
	keep := -1
	if _, ok := position(r.ours[0]); ok {
		// What was not read is given back in the end: the pipe has to be there then.
		keep, _ = unix.FcntlInt(r.theirs[0].Fd(), unix.F_DUPFD_CLOEXEC, 0)
	}
	r.closeTheirs()
	go func() { r.fed <- r.feed(keep) }()
}

// finish is called when the process has ended, or was not started: it delivers what the process has printed.
// What others print that it has left behind is waited for a moment; then they have a broken pipe.
//
// It returns the status of the process: where its output was cut short by a reader that went away, or by a signal, that
// is in the place of 0. Any other failure is an error.
func (r *relay) finish(signals <-chan os.Signal, status int) (int, error) {
	defer r.stop.close()
	if !r.begun {
		r.closeTheirs()
	}
	var errs []error
	cut := 0
	linger := time.After(lingering)
	for i, f := range r.outputs {
		for waiting := true; waiting; {
			select {
			case <-f.done:
				waiting = false
			case <-linger:
				r.stop.close()
			case s := <-signals:
				if n, ok := ends(s); ok {
					return orStatus(status, n), nil
				}
			}
		}
		switch {
		case errors.Is(f.err, unix.EPIPE):
			if f.cut {
				cut = 128 + int(unix.SIGPIPE)
			}
		case f.err != nil:
			errs = append(errs, fmt.Errorf("write standard %s: %w", []string{"output", "error"}[i], f.err))
		}
	}
	r.stop.close()
	if r.begun {
		select {
		case err := <-r.fed:
			errs = append(errs, err)
		case <-time.After(lingering): // a read that can't be interrupted, for which nobody waits
		}
	}
	return orStatus(status, cut), errors.Join(errs...)
}

// ends reports whether a signal ends this process once that which it ran has ended, and with which status.
func ends(s os.Signal) (status int, ok bool) {
	switch s {
	case unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT:
		return 128 + int(s.(unix.Signal)), true
	}
	return 0, false
}

func orStatus(status, otherwise int) int {
	if status == 0 {
		return otherwise
	}
	return status
}

// feed gives the process this process's standard input. The end of that, and the process's end, are no errors.
func (r *relay) feed(keep int) error {
	f := &flow{from: r.ours[0], to: r.input, stop: r.stop, input: true}
	var st unix.Stat_t
	err := unix.Fstat(f.from, &st)
	switch offset, seekable := position(f.from); {
	case err != nil:
	case seekable:
		f.offset = &offset
		begin := offset
		err = f.run()
		_ = unix.Close(r.input)
		<-r.stop.closed
		if n, qerr := queued(keep); qerr == nil {
			_, _ = unix.Seek(f.from, max(begin, offset-int64(n)), 0) // the process may have written to the pipe
		}
		_ = unix.Close(keep)
	case st.Mode&unix.S_IFMT == unix.S_IFIFO:
		var eager bool
		if eager, err = f.step(); eager {
			err = f.run()
		}
	case isTerminal(f.from):
		err = f.typed()
	default:
		f.waits = true
		err = f.run()
	}
	if f.offset == nil {
		_ = unix.Close(r.input)
	}
	// A standard input that is not open for reading, as nohup leaves it, is empty.
	if err == nil || err == io.EOF || errors.Is(err, errStopped) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EBADF) {
		return nil
	}
	return fmt.Errorf("read standard input: %w", err)
}

// position is where a descriptor stands that can stand elsewhere.
func position(fd int) (offset int64, ok bool) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG && st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, false
	}
	offset, err := unix.Seek(fd, 0, 1)
	return offset, err == nil
}

func isTerminal(fd int) bool {
	_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	return err == nil
}

// queued is how many bytes a pipe holds.
func queued(pipe int) (int, error) { return unix.IoctlGetInt(pipe, unix.TIOCINQ) }

// errStopped ends a flow whose latch was closed.
var errStopped = errors.New("stopped")

// flow moves bytes from one descriptor to another. One of them is a pipe of ours.
type flow struct {
	from, to int
	offset   *int64 // in from
	input    bool   // it is the process that reads
	waits    bool   // a read of from may block
	stop     *latch

	done chan struct{} // closed when all was delivered
	err  error         // of that
	cut  bool          // what was read could not be written

	copies bool // from and to are none that the kernel splices
	buf    []byte
}

// deliver moves what the process prints. Where that can't be written, the process has a broken pipe.
func (f *flow) deliver() {
	f.err = f.run()
	_ = unix.Close(f.from)
	close(f.done)
}

// run moves all until from ends. Once the latch is closed, an output goes on with what the pipe holds by then, and
// an input is errStopped. EPIPE is a reader that has gone away.
func (f *flow) run() error {
	left := -1 // no limit
	for {
		if f.stop.isClosed() {
			if f.input {
				return errStopped
			}
			if left < 0 {
				var err error
				if left, err = queued(f.from); err != nil {
					return err
				}
			}
			if left == 0 {
				return nil
			}
		}
		var n int
		var err error
		if f.waits {
			err = f.wait()
		}
		if err == nil {
			n, err = f.move(left)
		}
		if err == unix.EAGAIN {
			if err = f.wait(); err == nil {
				continue
			}
		}
		switch {
		case err == unix.EINTR:
		case err == io.EOF:
			return nil
		case err == unix.EINVAL && !f.copies:
			f.copies, f.buf = true, make([]byte, 64<<10)
		case err != nil:
			return err
		case n == 0:
			return nil
		case left > 0:
			left -= min(n, left)
		}
	}
}

// move moves some bytes, at most limit if that is not negative.
func (f *flow) move(limit int) (n int, err error) {
	room := 1 << 20
	if limit >= 0 {
		room = min(room, limit)
	}
	if !f.copies {
		n, err := unix.Splice(f.from, f.offset, f.to, nil, room, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if err != nil && err != unix.EAGAIN && err != unix.EINTR && err != unix.EINVAL {
			f.cut = true
		}
		return int(n), err
	}
	if f.offset != nil {
		if n, err = unix.Pread(f.from, f.buf, *f.offset); n > 0 {
			*f.offset += int64(n)
		}
	} else {
		n, err = unix.Read(f.from, f.buf[:min(room, len(f.buf))])
	}
	if err != nil || n == 0 {
		return max(n, 0), err
	}
	if err := f.write(f.buf[:n]); err != nil {
		f.cut = true
		return 0, err
	}
	return n, nil
}

// write writes all. The descriptor may be one that does not block.
func (f *flow) write(b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(f.to, b)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if err := f.room(); err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			b = b[n:]
		}
	}
	return nil
}

// wait waits until there is something to move and room for it, or until the latch is closed. It returns io.EOF where
// nothing will come, and EPIPE for a reader that has gone away while there was nothing to read.
func (f *flow) wait() error {
	fds := []unix.PollFd{{Fd: int32(f.from), Events: unix.POLLIN}, {Fd: int32(f.to)}}
	if f.input || !f.stop.isClosed() {
		fds = append(fds, unix.PollFd{Fd: int32(f.stop.r), Events: unix.POLLIN})
	}
	if err := poll(fds); err != nil {
		return err
	}
	switch from := fds[0].Revents; {
	case f.input && fds[2].Revents != 0:
		return errStopped
	case from&unix.POLLIN != 0:
		return f.room()
	case from&unix.POLLHUP != 0:
		return io.EOF
	case fds[1].Revents&(unix.POLLERR|unix.POLLHUP) != 0:
		return unix.EPIPE
	}
	return nil
}

// room waits until the reader takes more.
func (f *flow) room() error {
	fds := []unix.PollFd{{Fd: int32(f.to), Events: unix.POLLOUT}}
	if f.input {
		fds = append(fds, unix.PollFd{Fd: int32(f.stop.r), Events: unix.POLLIN})
	}
	err := poll(fds)
	if err == nil && f.input && fds[1].Revents != 0 {
		err = errStopped
	}
	return err
}

// step moves a pipe's bytes so that those which the process does not read stay there for whoever reads next, as in
// `producer | while read -r line; do run …; done`. It shows the process a page at a time and takes it from
// the pipe when it was read. A process that has read much so is one that reads all: then it returns true.
func (f *flow) step() (eager bool, err error) {
	const page = 4096
	null, err := unix.Open(os.DevNull, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(null)
	// A pipe with room for one page can be written to when that was read.
	if _, err := unix.FcntlInt(uintptr(f.to), unix.F_SETPIPE_SZ, page); err != nil {
		return true, nil
	}
	for taken := 0; taken < wary; {
		if err := f.wait(); err != nil {
			return false, err
		}
		n, err := unix.Tee(f.from, f.to, page, unix.SPLICE_F_NONBLOCK)
		switch {
		case err == unix.EAGAIN, err == unix.EINTR:
			continue
		case err != nil:
			return false, err
		case n == 0:
			return false, nil
		}
		fds := []unix.PollFd{{Fd: int32(f.to), Events: unix.POLLOUT}, {Fd: int32(f.stop.r), Events: unix.POLLIN}}
		if err := poll(fds); err != nil {
			return false, err
		}
		over := fds[1].Revents != 0 || fds[0].Revents&unix.POLLERR != 0
		unread := 0
		if over {
			if unread, err = queued(f.to); err != nil {
				return false, err
			}
		}
		for read := int(n) - unread; read > 0; {
			n, err := unix.Splice(f.from, nil, null, nil, read, unix.SPLICE_F_NONBLOCK)
			if err == unix.EINTR {
				continue
			}
			if err != nil || n == 0 {
				break // somebody else has taken it
			}
			read -= int(n)
		}
		if over {
			return false, errStopped
		}
		taken += int(n)
	}
	_, _ = unix.FcntlInt(uintptr(f.to), unix.F_SETPIPE_SZ, relayRoom)
	return true, nil
}

// typed moves what is typed on a terminal while this process's job is in the foreground. A job in the background
// is not stopped for what its process may never want to read.
func (f *flow) typed() error {
	signal.Ignore(unix.SIGTTIN)
	defer signal.Reset(unix.SIGTTIN)
	b := make([]byte, 4096)
	for {
		if !inForeground(f.from) {
			fds := []unix.PollFd{{Fd: int32(f.to)}, {Fd: int32(f.stop.r), Events: unix.POLLIN}}
			switch err := pollFor(checkEach, fds); {
			case err != nil:
				return err
			case fds[0].Revents != 0, fds[1].Revents != 0:
				return errStopped
			}
			continue
		}
		if err := f.wait(); err != nil {
			return err
		}
		n, err := unix.Read(f.from, b)
		switch {
		case err == unix.EINTR, err == unix.EAGAIN:
		case err == unix.EIO && !inForeground(f.from):
		case err == unix.EIO:
			return nil // it was hung up
		case err != nil:
			return err
		case n == 0:
			return nil
		default:
			if err := f.write(b[:n]); err != nil {
				return err
			}
		}
	}
}

// inForeground reports whether this process may read from a terminal.
func inForeground(fd int) bool {
	group, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	return err != nil || group == unix.Getpgrp() // one that controls no jobs of ours is free to read
}

func poll(fds []unix.PollFd) error { return pollFor(-1*time.Millisecond, fds) }

func pollFor(d time.Duration, fds []unix.PollFd) error {
	for {
		if _, err := unix.Poll(fds, int(d.Milliseconds())); err != unix.EINTR {
			return err
		}
	}
}

// latch is closed once, which those see that poll its descriptor.
type latch struct {
	r, w   int
	once   sync.Once
	closed chan struct{}
	was    atomic.Bool
}

func newLatch() (*latch, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	return &latch{r: p[0], w: p[1], closed: make(chan struct{})}, nil
}

func (l *latch) close() {
	l.once.Do(func() {
		l.was.Store(true)
		close(l.closed)
		_ = unix.Close(l.w)
	})
}

func (l *latch) isClosed() bool { return l.was.Load() }

// foreground runs the process and returns its status. Its streams are as s says, or a terminal's.
func (u *execution) foreground(ctx context.Context, signals <-chan os.Signal, s Streams) (status int, err error) {
	if err := u.startGuard(); err != nil {
		return -1, u.abandon(ctx, err)
	}
	opts := &runc.CreateOpts{}
	var term *terminal
	var rel *relay
	switch {
	case u.job.Terminal:
		if term, err = newTerminal(u.claim.path("console")); err != nil {
			return -1, u.abandon(ctx, err)
		}
		opts.ConsoleSocket = term
		defer term.close()
	case s == Inherited:
		opts.IO = inherited{}
	default:
		if rel, err = newRelay([3]int{0, 1, 2}); err != nil {
			return -1, u.abandon(ctx, err)
		}
		opts.IO = rel
	}
	pid, err := u.start(ctx, opts, term)
	if err == nil {
		if rel != nil {
			rel.begin()
		}
		status, err = wait(pid, signals, term)
	}
	if err != nil {
		err = u.abandon(ctx, err)
		if rel != nil { // what the runtime says of it
			_, _ = rel.finish(signals, 0)
		}
		return -1, err
	}
	ended := exited(status)
	var terr error
	if term != nil {
		status, terr = term.finish(signals, status) // before the container is gone, its output has to be out
	}
	err = errors.Join(u.end(ctx, ended), terr)
	if rel != nil {
		var rerr error
		status, rerr = rel.finish(signals, status)
		err = errors.Join(err, rerr)
	}
	return status, err
}
