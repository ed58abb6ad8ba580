package content

import (
	"context"
	"errors"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A watch reports events of files and directories by inotify(7). inotify doesn't report what other machines do to a
// network file system, so the caller must check at intervals too.
type watch struct{ events *os.File }

// newWatch watches open files. It returns nil on failure. It doesn't watch names, which may lead to other files by now.
func newWatch(files ...*os.File) *watch {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil
	}
	w := &watch{os.NewFile(uintptr(fd), "inotify")}
	const changes = unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_CLOSE_WRITE | unix.IN_MOVE_SELF | unix.IN_DELETE_SELF |
		unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE
	for _, f := range files {
		if _, err := unix.InotifyAddWatch(fd, "/proc/self/fd/"+strconv.Itoa(int(f.Fd())), changes); err != nil {
			w.close()
			return nil
		}
	}
	return w
}

// wait waits for an event, at most for the time most. Events that arrive together count as one.
func (w *watch) wait(ctx context.Context, most time.Duration) (changed bool, err error) {
	if err := w.events.SetReadDeadline(time.Now().Add(most)); err != nil {
		return false, err
	}
	stop := context.AfterFunc(ctx, func() { _ = w.events.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var buf [4 << 10]byte
	_, err = w.events.Read(buf[:])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return false, ctx.Err()
	}
	return err == nil, err
}

func (w *watch) close() {
	if w != nil {
		_ = w.events.Close()
	}
}
