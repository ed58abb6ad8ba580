package runtime

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"distkit/events"

	runc "github.com/containerd/go-runc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// runtimeError reduces a runtime's error to one line.
func runtimeError(c *Container, what string, err error) error {
	text := err.Error()
	if i := strings.LastIndex(text, `"msg":"`); i >= 0 {
		text, _, _ = strings.Cut(text[i+len(`"msg":"`):], `"`)
	} else if i := strings.LastIndex(text, `msg="`); i >= 0 {
		if m, uerr := strconv.Unquote(quoted(text[i+len("msg="):])); uerr == nil {
			text = m
		}
	}
	return c.unlessEnded(what, fmt.Errorf("%s container %s: %s", what, c.ID, firstLine(text)))
}

// quoted returns the quoted string at the beginning of s.
func quoted(s string) string {
	q, err := strconv.QuotedPrefix(s)
	if err != nil {
		return s
	}
	return q
}

// InContainer is a process in a container.
type InContainer struct {
	Pid     int       `json:"pid"`          // on the host
	Inside  int       `json:"containerPid"` // in the container
	Parent  int       `json:"ppid"`         // on the host
	UID     int       `json:"uid"`          // on the host
	Started time.Time `json:"started"`
	CPU     int64     `json:"cpu"`            // nanoseconds of processor time
	RSS     int64     `json:"rss"`            // bytes of resident memory
	Exec    string    `json:"exec,omitempty"` // its ID, if task exec has started it
	Command []string  `json:"command"`
}

// Processes lists the processes in a container.
func (c *Container) Processes() ([]InContainer, error) {
	l, err := c.proc("").live()
	if err != nil {
		return nil, fmt.Errorf("processes: %w", err)
	}
	execs := map[int]string{}
	for _, x := range c.Execs() {
		if e, err := c.proc(x).look(); err == nil && e.status == Running {
			execs[e.state.Pid] = x
		}
	}
	var all []InContainer
	for _, pid := range l.pids() {
		p, err := describe(pid)
		if err != nil {
			continue // it has just ended
		}
		p.Exec = execs[pid]
		all = append(all, p)
	}
	return all, nil
}

func describe(pid int) (InContainer, error) {
	p := InContainer{Pid: pid, Inside: pid}
	dir := "/proc/" + strconv.Itoa(pid)
	s, err := statOf(pid)
	if err != nil {
		return p, err
	}
	const tick = time.Second / 100 // USER_HZ is 100 on all of Go's platforms
	p.Started = bootTime().Add(time.Duration(s.start) * tick)
	p.CPU, p.RSS = int64(s.user+s.system)*int64(tick), int64(s.rss)*int64(os.Getpagesize())
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return p, err
	}
	idMap, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return p, err
	}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		words := strings.Fields(value)
		if len(words) == 0 {
			continue
		}
		switch key {
		case "PPid":
			p.Parent, _ = strconv.Atoi(words[0])
		case "Uid":
			uid, _ := strconv.ParseInt(words[0], 10, 64)
			p.UID = int(outside(idMap, uid))
		case "NSpid":
			p.Inside, _ = strconv.Atoi(words[len(words)-1])
		case "Name":
			p.Command = []string{"[" + words[0] + "]"}
		}
	}
	if b, err := os.ReadFile(dir + "/cmdline"); err == nil && len(b) > 0 {
		p.Command = strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
	}
	return p, nil
}

// outside returns what a user of this process's user namespace is called outside of it. For an ordinary user's
// containers, outside is the host. idMap is in the form of /proc/self/uid_map (user_namespaces(7)).
func outside(idMap []byte, id int64) int64 {
	for line := range strings.Lines(string(idMap)) {
		var first, as, size int64
		if n, _ := fmt.Sscan(line, &first, &as, &size); n == 3 && id >= first && id-first < size {
			return as + id - first
		}
	}
	return id
}

func bootTime() time.Time {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(now.Nano())).UTC()
}

// Pause pauses all processes of a container until [Container.Resume].
func (c *Container) Pause(ctx context.Context) error {
	return c.setPaused(ctx, true, "pause", (*runc.Runc).Pause)
}

// Resume resumes the processes of a paused container.
func (c *Container) Resume(ctx context.Context) error {
	return c.setPaused(ctx, false, "resume", (*runc.Runc).Resume)
}

func (c *Container) setPaused(ctx context.Context, paused bool, verb string, do func(*runc.Runc, context.Context, string) error) error {
	l, err := c.proc("").attended(ctx, verb)
	switch {
	case err != nil:
		return err
	case paused && l.status == Paused:
		return failed("pause: container %s is paused already", c.ID)
	case !paused && l.status != Paused:
		return failed("resume: container %s is not paused", c.ID)
	case paused && len(l.state.Cgroups) == 0:
		return failed("pause: container %s has no cgroups of its own", c.ID)
	}
	if err := do(l.client(), ctx, c.key()); err != nil {
		return runtimeError(c, verb, err)
	}
	c.log(events.Event{Topic: "/tasks/" + verb + "d", Pid: l.state.Pid}) // paused, resumed
	return nil
}

// Update changes the limits of a running container.
func (c *Container) Update(ctx context.Context, r *specs.LinuxResources) error {
	l, err := c.proc("").live()
	if err != nil {
		return fmt.Errorf("update: %w", err)
	}
	if len(l.state.Cgroups) == 0 {
		return failed("update: container %s has no cgroups of its own", c.ID)
	}
	if _, unified := cgroupMounts(); unified {
		own := l.state.Cgroups[0]
		if missing := lacking(own, "cgroup.controllers", controllers(&specs.Linux{Resources: r})); len(missing) > 0 {
			return fmt.Errorf("update: container %s: %w", c.ID, errNoLimits(missing, own))
		}
	}
	if err := l.client().Update(ctx, c.key(), r); err != nil {
		return runtimeError(c, "update", err)
	}
	return nil
}

// Execs lists the IDs of a container's further processes.
func (c *Container) Execs() []string {
	var ids []string
	entries, _ := os.ReadDir(c.path("exec"))
	for _, e := range entries {
		if CheckID(e.Name()) == nil {
			ids = append(ids, e.Name())
		}
	}
	return ids
}
