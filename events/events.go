// Package events is the log of changes in a store: one JSON object per line, appended by the process that made the
// change (distkit-layout(5), events). Topics are those of containerd where it has one.
//
// [Append] adds an [Event] to the log. [Open] returns a [Log], whose Read calls a function with each event since the
// last call; the caller repeats it to follow the log. The log is rotated at 16 MiB by the process that writes.
//
// The log is a convenience, not a record to rely on: a change that can't be logged still happened, so Append returns no
// error. The content of the log is untrusted. Readers skip lines that are not events, and bound their length.
package events

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"distkit/disk"

	"golang.org/x/sys/unix"
)

// limit is the size in bytes at which the log is rotated.
var limit int64 = 16 << 20

// maxLine bounds the length of a line that is read. A longer line is not an event.
const maxLine = 4 << 20

const (
	current = "events"
	rotated = "events.1"
)

// Event is one change. Which fields are set depends on the topic.
type Event struct {
	Time        time.Time         `json:"time"`
	Namespace   string            `json:"namespace"` // "" for what all namespaces share: blobs, and snapshots named by digest
	Topic       string            `json:"topic"`
	Name        string            `json:"name,omitempty"` // of an image, a namespace or a committed snapshot
	Digest      string            `json:"digest,omitempty"`
	Size        int64             `json:"size,omitempty"`  // bytes; absent for 0
	Count       int               `json:"count,omitempty"` // number of blobs that a sweep deleted
	Key         string            `json:"key,omitempty"`
	Parent      string            `json:"parent,omitempty"`
	Snapshotter string            `json:"snapshotter,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Container   string            `json:"container,omitempty"`
	Exec        string            `json:"exec,omitempty"`
	Pid         int               `json:"pid,omitempty"`
	Status      *int              `json:"status,omitempty"` // of a process that has exited, if known
}

// Field returns a field for containerd's filters: namespace, topic, or event.FIELD for any other field. "event." may be
// omitted.
func (e Event) Field(fieldpath []string) (value string, present bool) {
	if len(fieldpath) > 1 && fieldpath[0] == "event" {
		fieldpath = fieldpath[1:]
	}
	if len(fieldpath) > 1 && fieldpath[0] == "labels" {
		value, present = e.Labels[strings.Join(fieldpath[1:], ".")]
		return value, present
	}
	switch strings.Join(fieldpath, ".") {
	case "topic":
		value = e.Topic
	case "namespace":
		value = e.Namespace
	case "name":
		value = e.Name
	case "digest":
		value = e.Digest
	case "size":
		if e.Digest != "" || e.Count != 0 {
			value = strconv.FormatInt(e.Size, 10)
		}
	case "count":
		if e.Count != 0 {
			value = strconv.Itoa(e.Count)
		}
	case "key":
		value = e.Key
	case "parent":
		value = e.Parent
	case "snapshotter":
		value = e.Snapshotter
	case "container":
		value = e.Container
	case "exec":
		value = e.Exec
	case "pid":
		if e.Pid != 0 {
			value = strconv.Itoa(e.Pid)
		}
	case "status":
		if e.Status != nil {
			value = strconv.Itoa(*e.Status)
		}
	}
	return value, value != ""
}

// maxBatch bounds the bytes that are written under one lock, so that other processes don't wait long, and a rotated log
// has space for them.
const maxBatch = 256 << 10

// Append adds events with the current time to the log of the store at root. It locks the log once per batch of up to
// some thousand events. Errors are ignored.
func Append(root string, all ...Event) {
	now := time.Now().UTC()
	var lines []byte
	for _, e := range all {
		e.Time = now
		line, err := json.Marshal(e)
		if err != nil {
			continue
		}
		if len(lines)+len(line) >= maxBatch {
			_ = write(root, lines)
			lines = nil
		}
		lines = append(append(lines, line...), '\n')
	}
	if len(lines) > 0 {
		_ = write(root, lines)
	}
}

// patience is how long a writer waits for the log's lock.
const patience = 2 * time.Second

func write(root string, lines []byte) error {
	tree := disk.Tree(root)
	// The change itself has happened: it must not wait for a process that keeps the log locked.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		f, err := tree.LockFile(ctx, current, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o666, unix.LOCK_EX)
		if err != nil {
			return err
		}
		retry, err := writeTo(tree, f, lines)
		disk.Release(f)
		if !retry || err != nil {
			return err
		}
	}
}

// writeTo appends lines to the log, which the caller has locked. retry is true if it rotated the log instead.
func writeTo(tree disk.Tree, f *os.File, lines []byte) (retry bool, err error) {
	fi, err := f.Stat()
	if err != nil {
		return false, err
	}
	size := fi.Size()
	if size > 0 && size+int64(len(lines)) > limit {
		// Processes that wait for the lock then find a different file of that name, or none.
		return true, tree.Rename(current, rotated)
	}
	if size > 0 {
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, size-1); err != nil {
			return false, err
		}
		if last[0] != '\n' {
			lines = append([]byte{'\n'}, lines...) // ends the line of a writer that was killed
		}
	}
	if _, err := f.Write(lines); err != nil {
		return false, errors.Join(err, f.Truncate(size)) // on a full disk, removes the part of the line that was written
	}
	return false, nil
}

// Log reads the events of a store, beginning with the oldest one kept.
type Log struct {
	root  string
	files []*os.File // in the order of reading; the last one may be the current log
	part  []byte     // an incomplete line
	long  bool       // the incomplete line is longer than maxLine
}

// Open opens the log of the store at root. The log need not exist.
func Open(root string) (*Log, error) {
	l := &Log{root: root}
	for {
		now, err := open(root, current)
		if err != nil {
			return nil, err
		}
		before, err := open(root, rotated)
		if err != nil {
			closeAll(now)
			return nil, err
		}
		if now != nil && before != nil && same(now, before) {
			closeAll(now, before) // rotated between the two calls
			continue
		}
		for _, f := range []*os.File{before, now} {
			if f != nil {
				l.files = append(l.files, f)
			}
		}
		return l, nil
	}
}

// open opens a file of the log. It returns nil if the file doesn't exist.
func open(root, name string) (*os.File, error) {
	f, err := disk.Tree(root).Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return f, err
}

func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}

func same(a, b *os.File) bool {
	x, err := a.Stat()
	if err != nil {
		return false
	}
	y, err := b.Stat()
	return err == nil && os.SameFile(x, y)
}

// Close closes the log.
func (l *Log) Close() error {
	closeAll(l.files...)
	l.files = nil
	return nil
}

// Read calls f with each event that was appended since the last call. line is the event's line with its newline, valid
// until f returns. Lines that are not events, such as torn ones, are skipped.
func (l *Log) Read(f func(e Event, line []byte) error) error {
	if err := l.addNewFiles(); err != nil {
		return err
	}
	for i, file := range l.files {
		if err := l.readFile(file, f); err != nil {
			return err
		}
		if i < len(l.files)-1 {
			l.part, l.long = nil, false
			_ = file.Close()
		}
	}
	if n := len(l.files); n > 1 {
		l.files = l.files[n-1:]
	}
	return nil
}

// Count counts the events among those that the next Read would return for which want is true. It doesn't consume them.
func (l *Log) Count(want func(e Event) (bool, error)) (n int, err error) {
	for _, file := range l.files {
		from, err := file.Seek(0, io.SeekCurrent)
		if err != nil {
			return 0, err
		}
		err = l.readFile(file, func(e Event, _ []byte) error {
			ok, err := want(e)
			if ok {
				n++
			}
			return err
		})
		l.part, l.long = nil, false
		if err != nil {
			return 0, err
		}
		if _, err := file.Seek(from, io.SeekStart); err != nil {
			return 0, err
		}
	}
	return n, nil
}

// addNewFiles adds the files that appeared since the last call.
func (l *Log) addNewFiles() error {
	newer, err := Open(l.root)
	if err != nil {
		return err
	}
	for i := len(newer.files) - 1; i >= 0 && len(l.files) > 0; i-- {
		if same(newer.files[i], l.files[len(l.files)-1]) {
			closeAll(newer.files[:i+1]...)
			l.files = append(l.files, newer.files[i+1:]...)
			return nil
		}
	}
	// None of the files is known: all are newer.
	l.files = append(l.files, newer.files...)
	return nil
}

func (l *Log) readFile(file *os.File, f func(Event, []byte) error) error {
	if err := l.restart(file); err != nil {
		return err
	}
	b := make([]byte, 64<<10)
	for {
		n, err := file.Read(b)
		for rest := b[:n]; len(rest) > 0; {
			end := bytes.IndexByte(rest, '\n')
			if end < 0 {
				l.add(rest)
				break
			}
			l.add(rest[:end+1])
			rest = rest[end+1:]
			if err := l.line(f); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// restart seeks to the beginning of a file that is now shorter than the part that was read, as after "> events". Its
// present content was appended since then.
func (l *Log) restart(file *os.File) error {
	fi, err := file.Stat()
	if err != nil {
		return err
	}
	offset, err := file.Seek(0, io.SeekCurrent)
	if err != nil || offset <= fi.Size() {
		return err
	}
	l.part, l.long = nil, false
	_, err = file.Seek(0, io.SeekStart)
	return err
}

// add appends to the incomplete line. It keeps nothing of a line that is too long.
func (l *Log) add(b []byte) {
	if l.long = l.long || len(l.part)+len(b) > maxLine; l.long {
		l.part = l.part[:0]
		return
	}
	l.part = append(l.part, b...)
}

// line calls f with the completed line, if it is an event.
func (l *Log) line(f func(Event, []byte) error) error {
	line, long := l.part, l.long
	l.part, l.long = l.part[:0], false
	var e Event
	if long || json.Unmarshal(line, &e) != nil || e.Topic == "" {
		return nil
	}
	return f(e, line)
}
