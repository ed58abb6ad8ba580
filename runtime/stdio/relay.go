package stdio

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lingering is how long finish waits for output of processes that the process has left running.
const lingering = time.Second

// relay connects the standard streams of a process, which are pipes, with this process's.
type relay struct {
	Ends            // the ends for the process
	ours    [3]int  // this process's descriptors
	input   int     // our end of the pipe for the process's input
	outputs []*flow // one each for the process's output and error
	stop    *latch  // closed when the process has ended
	fed     chan error
	begun   bool
}

// newRelay makes the pipes, and starts to copy the process's output to ours[1] and ours[2].
func newRelay(ours [3]int) (*relay, error) {
	r := &relay{ours: ours, fed: make(chan error, 1), input: -1}
	err := func() (err error) {
		if r.stop, err = newLatch(); err != nil {
			return err
		}
		from, to, err := newPipe()
		if err != nil {
			return err
		}
		r.Ends[0], r.input = os.NewFile(uintptr(from), "pipe"), to
		for i := 1; i <= 2; i++ {
			// If output and error are one file, they stay one, to keep the order of lines.
			if i == 2 && sameOutput(r.ours[1], r.ours[2]) {
				r.Ends[2] = r.Ends[1]
				break
			}
			if from, to, err = newPipe(); err != nil {
				return err
			}
			r.Ends[i] = os.NewFile(uintptr(to), "pipe")
			_ = unix.SetNonblock(from, true)
			_, _ = unix.FcntlInt(uintptr(from), unix.F_SETPIPE_SZ, relayRoom) // on failure the pipe keeps the kernel's default size
			flags, err := unix.FcntlInt(uintptr(r.ours[i]), unix.F_GETFL, 0)
			// splice(2) fails on a descriptor that is not open for writing, even if there is nothing to write.
			unfit := err != nil || flags&unix.O_ACCMODE == unix.O_RDONLY
			r.outputs = append(r.outputs, &flow{from: from, to: r.ours[i], waits: unfit, stop: r.stop, done: make(chan struct{})})
		}
		return nil
	}()
	if err != nil {
		r.Ends.close()
		return nil, fmt.Errorf("pipes for the standard streams: %w", err)
	}
	for _, f := range r.outputs {
		go f.deliver()
	}
	return r, nil
}

// sameOutput reports whether two descriptors write to the same place of a file: they share an offset, or their writes
// use none, as on a pipe or with O_APPEND.
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

// begin is called when the process runs. Nothing is read from this process's standard input before.
func (r *relay) begin() {
	r.begun = true
	keep := -1
	if _, ok := position(r.ours[0]); ok {
		// At the end, feed seeks back over input that the process has not read. The pipe must still be open then.
		keep, _ = unix.FcntlInt(r.Ends[0].Fd(), unix.F_DUPFD_CLOEXEC, 0)
	}
	r.Ends.close()
	go func() { r.fed <- r.feed(keep) }()
}

// finish is called when the process has ended, or was not started. It delivers the process's output. Processes that it
// has left running may print for a moment longer; after that they get a broken pipe.
func (r *relay) finish(signals <-chan os.Signal, status int) (int, error) {
	defer r.stop.close()
	if !r.begun {
		r.Ends.close()
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
		case <-time.After(lingering): // nobody waits for a read that can't be interrupted
		}
	}
	return orStatus(status, cut), errors.Join(errs...)
}

// ends reports whether a signal received after the process has ended terminates this process, and with which status.
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

// feed copies this process's standard input to the process. The end of either is not an error.
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
			_, _ = unix.Seek(f.from, max(begin, offset-int64(n)), 0) // but the process may have written to the pipe itself
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
	// A standard input that is not open for reading, as under nohup, counts as empty.
	if err == nil || err == io.EOF || errors.Is(err, errStopped) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EBADF) {
		return nil
	}
	return fmt.Errorf("read standard input: %w", err)
}

// position returns the offset of a descriptor. ok is false if it can't seek.
func position(fd int) (offset int64, ok bool) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG && st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, false
	}
	offset, err := unix.Seek(fd, 0, 1)
	return offset, err == nil
}
