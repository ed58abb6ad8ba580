package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// watcher tells that something has changed in a directory.
type watcher struct {
	f       *os.File
	changed chan struct{}
}

// watch watches the directory of what, which is NotFound where there is none.
func watch(dir, what string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	w := &watcher{os.NewFile(uintptr(fd), "inotify"), make(chan struct{}, 1)}
	const mask = unix.IN_MODIFY | unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_DELETE | unix.IN_DELETE_SELF
	if _, err := unix.InotifyAddWatch(fd, dir, mask); err != nil {
		_ = w.f.Close()
		if errors.Is(err, unix.ENOENT) {
			return nil, notFound("no %s", what)
		}
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	go func() {
		b := make([]byte, 4096)
		for {
			if n, err := w.f.Read(b); n <= 0 || err != nil {
				return
			}
			select {
			case w.changed <- struct{}{}:
			default:
			}
		}
	}()
	return w, nil
}

// wait returns at the next change, or after a while: not all that matters changes a file.
func (w *watcher) wait(ctx context.Context, most time.Duration) error {
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

func (w *watcher) close() { _ = w.f.Close() }
