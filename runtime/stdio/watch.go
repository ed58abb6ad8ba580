// Package stdio handles the standard streams of processes: pipes and terminals between a process and its caller in the
// foreground ([Foreground]), and for a detached process an input, a log and attached callers ([Detached], [Attach]). It
// knows nothing of runtimes and containers.
//
// A process never gets this process's own files or terminal, unless the caller asks with [Inherit]: it could reopen,
// take over or truncate them. Bytes are moved by splice(2) between the pipes and this process's files. No detached
// process ever waits for a reader. Its output goes to a log, which a [Writer] rotates and a [Reader] follows. Output
// that a slow reader or a full disk has lost is counted and reported as [Missing].
//
// A caller makes the streams, passes their [Ends] (or the socket of a [Console]) to the runtime, calls Begin once the
// process runs, and Finish or Settle when it has ended.
package stdio

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Watcher waits for changes in a directory.
type Watcher struct {
	f       *os.File // nil if the user has no inotify instance left
	changed chan struct{}

	mu       sync.Mutex
	callback func() // set by onChange
}

// lookEach is the longest time that Wait waits if there is no inotify instance.
const lookEach = 20 * time.Millisecond

// Watch watches a directory. If there is no such directory, the error is fs.ErrNotExist. Users have few inotify
// instances (128 by default). If none is left, Wait returns at short intervals instead.
func Watch(dir string) (*Watcher, error) {
	w := &Watcher{changed: make(chan struct{}, 1)}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if errors.Is(err, unix.EMFILE) {
		_, err := os.Stat(dir)
		return w, err
	}
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	const mask = unix.IN_MODIFY | unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_DELETE | unix.IN_DELETE_SELF
	if _, err := unix.InotifyAddWatch(fd, dir, mask); err != nil {
		_ = unix.Close(fd)
		return nil, &fs.PathError{Op: "watch", Path: dir, Err: err}
	}
	w.f = os.NewFile(uintptr(fd), "inotify")
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := w.f.Read(b)
			if n <= 0 || err != nil {
				return
			}
			w.mu.Lock()
			if w.callback != nil && madeFile(b[:n]) {
				w.callback()
			}
			w.mu.Unlock()
			select {
			case w.changed <- struct{}{}:
			default:
			}
		}
	}()
	return w, nil
}

// madeFile reports whether inotify events include one for a new or renamed file, or a lost event.
func madeFile(events []byte) bool {
	for len(events) >= unix.SizeofInotifyEvent {
		e := (*unix.InotifyEvent)(unsafe.Pointer(&events[0]))
		if e.Mask&(unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_Q_OVERFLOW) != 0 {
			return true
		}
		events = events[min(len(events), unix.SizeofInotifyEvent+int(e.Len)):]
	}
	return false
}

// onChange sets a function that is called in another goroutine for each new file, or nil.
func (w *Watcher) onChange(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.callback = f
}

// Wait waits for the next change, at most for most: the caller may also wait for something that changes no file.
func (w *Watcher) Wait(ctx context.Context, most time.Duration) error {
	if w.f == nil {
		most = min(most, lookEach)
	}
	t := time.NewTimer(most)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-w.changed:
	case <-t.C:
	}
	return nil
}

// Close stops watching.
func (w *Watcher) Close() {
	if w.f != nil {
		_ = w.f.Close()
	}
}
