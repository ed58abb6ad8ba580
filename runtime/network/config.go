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

// Bridge is the name of the network that needs no configuration: a bridge of the host with
// addresses of Subnet, the world reached by masquerading, and ports.
const Bridge = "bridge"

// Subnet has the addresses of [Bridge]. The first one is the host's. Subnet6 has more of them if the host forwards IPv6.
const (
	Subnet  = "10.86.0.0/16"
	Subnet6 = "fd64:6973:746b:6974::/64"
)

// The names that [Bridge] has for CNI, for the kernel, and as a chain of iptables.
const (
	bridgeName   = "distkit"
	bridgeLink   = "distkit0"
	publishChain = "DISTKIT-ADMIN"
	// ofPublished is what our rule in it has, as iptables prints it. Other rules are the administrator's.
	ofPublished = " -o " + bridgeLink + " "
)

// forwards6 says 1 if the host forwards IPv6. It is a variable for tests.
var forwards6 = "/proc/sys/net/ipv6/conf/all/forwarding"

// bridge returns the configuration of [Bridge]. Its leases end with the boot, as do the networks that have them.
//
// The firewall plugin lets connections through on hosts whose FORWARD chain drops what it doesn't know, as docker's does.
// It needs iptables; without that, the other plugins take nftables if they can.
//
// Networks get IPv6 addresses only if the host forwards IPv6 already. The plugin would switch that on, and a host that
// forwards ignores router advertisements, so it could lose its own default route.
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
		panic(err) // constants
	}
	return b
}

// PluginDirs are the directories that have CNI's plugins: those of CNI_PATH if it is set, else where distributions put them.
func PluginDirs() []string {
	if dirs := filepath.SplitList(os.Getenv("CNI_PATH")); len(dirs) > 0 {
		return dirs
	}
	return []string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"}
}

// Config finds the configuration of a network by its name: the path of a file if there is a slash in it, else the name of a
// configuration in dir (mostly /etc/cni/net.d), else [Bridge]. The error is NotFound if there is none, and InvalidArgument if
// the file is not a configuration of CNI.
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

// Wanted is a network that is to be made.
type Wanted struct {
	config     *libcni.NetworkConfigList // nil for one of pasta
	pasta      *pasta
	ports      []Port
	connection runtime.Connection
}

// Find finds the configuration that a connection names, as [Config] does unless it is [Pasta], and checks the connection. Its ports and
// its names are InvalidArgument if they can't be had. Its paths need not be absolute.
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

// Connection returns what a container's record keeps of the network, so that it can be made again.
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

// parse reads a list of plugins, or the configuration of a single plugin.
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

// Port is a port of the host that leads to one of the network, as CNI's plugins take it.
type Port struct {
	HostIP        string `json:"hostIP,omitempty"`
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	Protocol      string `json:"protocol"` // tcp, udp or sctp
}

// String is the form that [ParsePort] takes.
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

// ParsePort takes [IP:]HOST:CONTAINER[/PROTOCOL], an IPv6 address in brackets. InvalidArgument
// for anything else.
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

// check fails if a plugin isn't installed, or if there are ports and no plugin maps them.
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
