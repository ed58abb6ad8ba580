package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"distkit/errclass"
	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
)

// Bridge is the name of the built-in network: a bridge on the host with addresses of Subnet, masquerading, and
// published ports.
const Bridge = "bridge"

// Subnet has the addresses of [Bridge]. The first one is the host's. Subnet6 is used too if the host forwards IPv6.
const (
	Subnet  = "10.86.0.0/16"
	Subnet6 = "fd64:6973:746b:6974::/64"
)

// Names of [Bridge]: for CNI, for the kernel, and as a chain of iptables.
const (
	bridgeName   = "distkit"
	bridgeLink   = "distkit0"
	publishChain = "DISTKIT-ADMIN"
	// ofPublished is a part of our own rule in that chain, as iptables prints it. Other rules there are the
	// administrator's.
	ofPublished = " -o " + bridgeLink + " "
)

// forwards6 is a file that contains 1 if the host forwards IPv6. It is a variable for tests.
var forwards6 = "/proc/sys/net/ipv6/conf/all/forwarding"

// bridge returns the configuration of [Bridge]. Leases do not survive a boot, like the networks that hold them.
//
// The firewall plugin lets connections through on hosts whose FORWARD chain drops unknown ones, as docker's does. It
// needs iptables; without that, the other plugins use nftables if they can.
//
// Networks get IPv6 addresses only if the host forwards IPv6 already. The plugin would turn forwarding on, and a
// forwarding host ignores router advertisements, so it could lose its own default route.
func bridge() []byte {
	type fields map[string]any
	ranges := []any{[]any{fields{"subnet": Subnet}}}
	routes := []any{fields{"dst": "0.0.0.0/0"}}
	if b, err := os.ReadFile(forwards6); err == nil && strings.TrimSpace(string(b)) == "1" {
		ranges = append(ranges, []any{fields{"subnet": Subnet6}})
		routes = append(routes, fields{"dst": "::/0"})
	}
	plugins := []any{
		fields{"type": "bridge", "bridge": bridgeLink, "isGateway": true, "ipMasq": true, "hairpinMode": true,
			"ipam": fields{"type": "host-local", "dataDir": filepath.Join(hostDir, "addresses"), "ranges": ranges, "routes": routes}},
		fields{"type": "portmap", "capabilities": fields{"portMappings": true}},
	}
	if _, err := exec.LookPath("iptables"); err == nil {
		plugins = append(plugins, fields{"type": "firewall", "iptablesAdminChainName": publishChain})
	}
	b, err := json.Marshal(fields{"cniVersion": "1.0.0", "name": bridgeName, "plugins": plugins})
	if err != nil {
		panic(err) // can't happen: only constants
	}
	return b
}

// PluginDirs returns the directories with CNI's plugins: those in CNI_PATH if it is set, else where distributions
// install them.
func PluginDirs() []string {
	if dirs := filepath.SplitList(os.Getenv("CNI_PATH")); len(dirs) > 0 {
		return dirs
	}
	return []string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"}
}

// Config finds the configuration of a network by name. A name with a slash is the path of a file. Otherwise it is the
// name of a configuration in dir (usually /etc/cni/net.d), or else [Bridge]. NotFound: there is none. InvalidArgument:
// the file is not a CNI configuration.
func Config(name, dir string) (*libcni.NetworkConfigList, error) {
	if strings.Contains(name, "/") {
		return read(name)
	}
	names, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", name, err)
	}
	var bad error
	for _, file := range names {
		config, err := read(file)
		if err != nil {
			bad = err
			continue
		}
		if config.Name == name {
			return config, nil
		}
	}
	if name == Bridge {
		return parse(bridge(), Bridge)
	}
	if bad != nil {
		return nil, fmt.Errorf("network %s: not found in %s, where a file can't be used: %w", name, dir, bad)
	}
	return nil, errclass.Errorf(errdefs.ErrNotFound, "network %s: not found in %s", name, dir)
}

// Wanted is a network to be made.
type Wanted struct {
	config     *libcni.NetworkConfigList // nil for pasta
	pasta      *pasta
	ports      []Port
	connection runtime.Connection
}

// Find finds the configuration that a connection names, as [Config] does, unless it is [Pasta]. It also checks the
// connection. InvalidArgument: its ports or names are not possible. Its paths may be relative.
func Find(c runtime.Connection) (*Wanted, error) {
	w := &Wanted{}
	by, ok, err := parsePasta(c.Name)
	if ok {
		w.pasta, c.ConfDir = by, ""
	} else {
		w.config, err = Config(c.Name, c.ConfDir)
	}
	if err != nil {
		return nil, err
	}
	for i, s := range c.Ports {
		p, err := ParsePort(s)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(w.ports, p.overlaps) {
			return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "port %q: %s is asked for twice", s, p.host())
		}
		w.ports, c.Ports[i] = append(w.ports, p), p.String()
	}
	if err := c.Names.Check(); err != nil {
		return nil, err
	}
	switch {
	case w.pasta != nil:
		err = w.pasta.check(w.ports)
		if err == nil && !w.pasta.HostLoopback && slices.ContainsFunc(c.Hosts, func(h string) bool { return strings.HasSuffix(h, ":"+spec.HostGateway) }) {
			err = errclass.Errorf(errdefs.ErrInvalidArgument, "the address %s goes with the network %s:%s", spec.HostGateway, Pasta, hostLoopback)
		}
	case strings.Contains(c.Name, "/"):
		c.Name, err = filepath.Abs(c.Name)
		c.ConfDir = ""
	default:
		c.ConfDir, err = filepath.Abs(c.ConfDir)
	}
	w.connection = c
	return w, err
}

// Resolves reports whether the network's resolv.conf has a name server.
func (w *Wanted) Resolves() (bool, error) {
	_, servers, err := resolvConf(w.connection.Names, w.pasta)
	return servers, err
}

// Connection returns the request for a container's record, from which the network can be made again.
func (w *Wanted) Connection() runtime.Connection { return w.connection }

func read(file string) (*libcni.NetworkConfigList, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		err = errclass.As(err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return parse(b, filepath.Base(file))
}

// parse parses a list of plugins, or the configuration of a single plugin.
func parse(b []byte, what string) (*libcni.NetworkConfigList, error) {
	config, err := libcni.NetworkConfFromBytes(b)
	if err == nil && len(config.Plugins) > 0 {
		return config, nil
	}
	one, oerr := libcni.NetworkPluginConfFromBytes(b)
	if oerr == nil {
		b, oerr = json.Marshal(map[string]any{
			"cniVersion": one.Network.CNIVersion, "name": one.Network.Name, "plugins": []json.RawMessage{b},
		})
	}
	if oerr == nil {
		config, oerr = libcni.NetworkConfFromBytes(b)
	}
	if oerr != nil {
		return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "%s: %w", what, errors.Join(err, oerr))
	}
	return config, nil
}

// Port maps a port of the host to one of the network, in the form of CNI's plugins.
type Port struct {
	HostIP        string `json:"hostIP,omitempty"`
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	Protocol      string `json:"protocol"` // tcp, udp or sctp
}

// String formats a port for [ParsePort].
func (p Port) String() string {
	s := fmt.Sprintf("%d:%d/%s", p.HostPort, p.ContainerPort, p.Protocol)
	switch {
	case strings.Contains(p.HostIP, ":"):
		s = "[" + p.HostIP + "]:" + s
	case p.HostIP != "":
		s = p.HostIP + ":" + s
	}
	return s
}

// ParsePort parses [IP:]HOST:CONTAINER[/PROTOCOL], with an IPv6 address in brackets. Anything else is InvalidArgument.
func ParsePort(s string) (p Port, err error) {
	bad := errclass.Errorf(errdefs.ErrInvalidArgument, "port %q: want [IP:]HOST:CONTAINER[/tcp|udp|sctp]", s)
	rest, protocol, has := strings.Cut(s, "/")
	p.Protocol = "tcp"
	if has {
		p.Protocol = strings.ToLower(protocol)
	}
	if p.Protocol != "tcp" && p.Protocol != "udp" && p.Protocol != "sctp" {
		return p, bad
	}
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return p, bad
	}
	host, container := rest[:i], rest[i+1:]
	if i := strings.LastIndexByte(host, ':'); i >= 0 {
		addr, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(host[:i], "["), "]"))
		if err != nil || addr.Is6() != strings.HasPrefix(host, "[") || addr.Zone() != "" {
			return p, bad
		}
		p.HostIP, host = addr.String(), host[i+1:]
	}
	for _, v := range []struct {
		text string
		to   *uint16
	}{{host, &p.HostPort}, {container, &p.ContainerPort}} {
		n, err := strconv.ParseUint(v.text, 10, 16)
		if err != nil || n == 0 {
			return p, bad
		}
		*v.to = uint16(n)
	}
	return p, nil
}

// check returns an error if a plugin is not installed, or if no plugin maps the ports.
func (n *Networks) check(config *libcni.NetworkConfigList, ports []Port) error {
	maps := len(ports) == 0
	for _, p := range config.Plugins {
		if _, err := invoke.FindInPath(p.Network.Type, n.plugins); err != nil {
			return errclass.Errorf(errdefs.ErrNotImplemented, "network %s: CNI's plugin %s is not in %s (Debian: containernetworking-plugins)",
				config.Name, p.Network.Type, strings.Join(n.plugins, ", "))
		}
		maps = maps || p.Network.Capabilities["portMappings"]
	}
	if !maps {
		return errclass.Errorf(errdefs.ErrInvalidArgument, "no plugin of network %s maps ports", config.Name)
	}
	return nil
}
