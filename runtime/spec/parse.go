package spec

import (
	"bufio"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// ParseMount parses docker's --mount: type=, src= (source=), dst= (target=, destination=), ro (readonly) and
// options=a:b, separated by commas, as in ctr. The default type is bind. The source of a bind is made absolute.
// Anything else is InvalidArgument.
func ParseMount(s string) (specs.Mount, error) {
	m := specs.Mount{Type: "bind"}
	bad := func(format string, a ...any) (specs.Mount, error) {
		return specs.Mount{}, invalid("mount %q: %s", s, fmt.Sprintf(format, a...))
	}
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return bad("%v", err)
	}
	readonly, propagation, bind := false, "rprivate", "rbind"
	var tmpfs []string
	for _, f := range fields {
		key, value, has := strings.Cut(f, "=")
		switch strings.ToLower(key) {
		case "type":
			m.Type = value
		case "src", "source":
			m.Source = value
		case "dst", "dest", "destination", "target":
			m.Destination = value
		case "ro", "readonly":
			readonly = true
			if has {
				if readonly, err = strconv.ParseBool(value); err != nil {
					return bad("%s is neither true nor false", f)
				}
			}
		case "bind-propagation":
			propagation = value
		case "bind-nonrecursive":
			bind = "bind"
		case "tmpfs-size":
			n, err := ParseSize(value)
			if err != nil {
				return bad("%v", err)
			}
			tmpfs = append(tmpfs, "size="+strconv.FormatInt(n, 10))
		case "tmpfs-mode":
			tmpfs = append(tmpfs, "mode="+value)
		case "options":
			m.Options = append(m.Options, strings.Split(value, ":")...)
		default:
			return bad("unknown key %q", key)
		}
	}
	if m.Destination == "" {
		return bad("dst is missing")
	}
	switch m.Type {
	case "bind", VolumeType:
		if err := completeBind(&m, bind, propagation); err != nil {
			return bad("%v", err)
		}
	case "tmpfs":
		if m.Source == "" {
			m.Source = "tmpfs"
		}
		if m.Options == nil {
			m.Options = []string{"nosuid", "nodev", "noexec"}
		}
		m.Options = append(m.Options, tmpfs...)
	case "":
		return bad("type is empty")
	}
	if readonly {
		m.Options = append(m.Options, "ro")
	}
	return m, nil
}

// completeBind makes the source of a bind mount absolute, and adds the options bind and propagation unless the mount has
// options of these kinds.
func completeBind(m *specs.Mount, bind, propagation string) (err error) {
	if m.Source == "" {
		return errors.New("src is missing")
	}
	if m.Type == "bind" {
		if m.Source, err = filepath.Abs(m.Source); err != nil {
			return err
		}
	}
	if !slices.ContainsFunc(m.Options, func(o string) bool { return o == "bind" || o == "rbind" }) {
		m.Options = append([]string{bind}, m.Options...)
	}
	if !slices.ContainsFunc(m.Options, isPropagation) {
		if !isPropagation(propagation) {
			return fmt.Errorf("unknown propagation %q", propagation)
		}
		m.Options = append(m.Options, propagation)
	}
	return nil
}

func isPropagation(o string) bool {
	return slices.Contains([]string{"private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable"}, o)
}

// VolumeType is the type of a mount whose source is the name of a volume. Runtimes do not know it: the owner of the
// volumes must turn it into a bind mount.
const VolumeType = "volume"

// ParseVolume parses docker's --volume SOURCE:TARGET[:OPTION,…]. A source without a slash is the name of a volume,
// except "." and "..".
func ParseVolume(s string) (specs.Mount, error) {
	f := strings.Split(s, ":")
	if len(f) < 2 || len(f) > 3 || f[0] == "" || f[1] == "" {
		return specs.Mount{}, invalid("volume %q is not SOURCE:TARGET[:OPTION,…]", s)
	}
	m := specs.Mount{Type: VolumeType, Source: f[0], Destination: f[1], Options: []string{"rbind"}}
	if strings.Contains(f[0], "/") || f[0] == "." || f[0] == ".." {
		source, err := filepath.Abs(f[0])
		if err != nil {
			return specs.Mount{}, fmt.Errorf("volume %q: %w", s, err)
		}
		m.Type, m.Source = "bind", source
	}
	propagation := "rprivate"
	if len(f) == 3 {
		for _, o := range strings.Split(f[2], ",") {
			switch {
			case o == "ro", o == "rw", o == "nosuid", o == "nodev", o == "noexec":
				m.Options = append(m.Options, o)
			case isPropagation(o):
				propagation = o
			default:
				return specs.Mount{}, invalid("volume %q: unknown option %q", s, o)
			}
		}
	}
	m.Options = append(m.Options, propagation)
	return m, nil
}

// ParseTmpfs parses docker's --tmpfs TARGET[:OPTION,…].
func ParseTmpfs(s string) (specs.Mount, error) {
	target, options, _ := strings.Cut(s, ":")
	m := specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: target, Options: []string{"nosuid", "nodev", "noexec"}}
	if options != "" {
		m.Options = append(m.Options, strings.Split(options, ",")...)
	}
	if !path.IsAbs(target) {
		return m, invalid("tmpfs %q is not an absolute path", s)
	}
	return m, nil
}

// ParseRlimit parses NAME=SOFT[:HARD]. Names are as in docker's --ulimit (nofile) or in setrlimit(2) (RLIMIT_NOFILE).
// -1 and unlimited mean no limit.
func ParseRlimit(s string) (specs.POSIXRlimit, error) {
	bad := func() (specs.POSIXRlimit, error) {
		return specs.POSIXRlimit{}, invalid("rlimit %q is not NAME=SOFT[:HARD]", s)
	}
	name, value, ok := strings.Cut(s, "=")
	if !ok {
		return bad()
	}
	name = strings.TrimPrefix(strings.ToUpper(name), "RLIMIT_")
	if !slices.Contains(strings.Fields("AS CORE CPU DATA FSIZE LOCKS MEMLOCK MSGQUEUE NICE NOFILE NPROC RSS RTPRIO RTTIME SIGPENDING STACK"), name) {
		return specs.POSIXRlimit{}, invalid("rlimit %q: unknown limit", s)
	}
	parse := func(s string) (uint64, bool) {
		if s == "-1" || s == "unlimited" {
			return math.MaxUint64, true
		}
		n, err := strconv.ParseUint(s, 10, 64)
		return n, err == nil
	}
	soft, hard, both := strings.Cut(value, ":")
	if !both {
		hard = soft
	}
	r := specs.POSIXRlimit{Type: "RLIMIT_" + name}
	var okSoft, okHard bool
	r.Soft, okSoft = parse(soft)
	r.Hard, okHard = parse(hard)
	if !okSoft || !okHard {
		return bad()
	}
	if r.Soft > r.Hard {
		return r, invalid("rlimit %q: soft is above hard", s)
	}
	return r, nil
}

// ParseDevice parses docker's --device SOURCE[:TARGET][:ACCESS], and looks the devices up with [HostDevices].
func ParseDevice(s string) ([]Device, error) {
	f := strings.Split(s, ":")
	source, target, access := f[0], f[0], "rwm"
	switch {
	case len(f) == 3:
		target, access = f[1], f[2]
	case len(f) == 2 && strings.HasPrefix(f[1], "/"):
		target = f[1]
	case len(f) == 2:
		access = f[1]
	case len(f) > 3:
		return nil, invalid("device %q is not SOURCE[:TARGET][:ACCESS]", s)
	}
	return HostDevices(source, target, access)
}

// ParseSize parses a number of bytes with an optional binary unit, as in docker's --memory: 512m, 1g, 64KiB.
func ParseSize(s string) (int64, error) {
	digits := strings.TrimRight(strings.ToLower(s), "kmgtib")
	shift, ok := map[string]int{
		"": 0, "b": 0, "k": 10, "kb": 10, "kib": 10, "m": 20, "mb": 20, "mib": 20,
		"g": 30, "gb": 30, "gib": 30, "t": 40, "tb": 40, "tib": 40,
	}[strings.ToLower(s[len(digits):])]
	n, err := strconv.ParseFloat(digits, 64)
	if !ok || err != nil || !(n >= 0) || n*float64(int64(1)<<shift) >= 1<<62 {
		return 0, invalid("size %q is not a number of bytes with k, m, g or t", s)
	}
	return int64(n * float64(int64(1)<<shift)), nil
}

// ParseLimit parses a size like [ParseSize]. It also accepts -1, which means no limit.
func ParseLimit(s string) (int64, error) {
	if s == "-1" {
		return -1, nil
	}
	return ParseSize(s)
}

// ParseEnv resolves docker's --env. NAME=VALUE is returned unchanged. NAME alone becomes this process's variable; if
// there is none, NAME is returned, which removes the image's variable.
func ParseEnv(s string) string {
	if !strings.Contains(s, "=") {
		if v, ok := os.LookupEnv(s); ok {
			return s + "=" + v
		}
	}
	return s
}

// ReadEnv reads docker's --env-file: a variable a line as in [ParseEnv], without quoting. Empty lines and lines that
// begin with # are skipped.
func ReadEnv(r io.Reader) ([]string, error) {
	var env []string
	lines := bufio.NewScanner(io.LimitReader(r, MaxDocument))
	lines.Buffer(nil, maxText+1)
	for lines.Scan() {
		line := strings.TrimLeft(lines.Text(), " \t")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		env = append(env, ParseEnv(line))
	}
	if err := lines.Err(); err != nil {
		return nil, invalid("read variables: %v", err)
	}
	return env, nil
}
