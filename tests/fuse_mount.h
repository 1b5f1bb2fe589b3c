#pragma once
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <linux/fuse.h>
#include <string>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace kiln::test {

/// An empty file system in user space, mounted on a directory of the superuser's for as long as this lives, that says
/// of itself that it belongs to whoever is told, closed to others. Its server is a process of its own.
class FuseMount {
public:
  /// `type` as in /proc/self/mountinfo: `fuse.sshfs`. Needs the superuser.
  FuseMount(const std::string& directory, const char* type, uid_t owner) : directory_(directory) {
    const int device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (device < 0)
      return;
    const std::string options =
        "fd=" + std::to_string(device) + ",rootmode=40700,user_id=12345,group_id=12345,allow_other";
    mounted_ = mount("kiln-test", directory.c_str(), type, MS_NOSUID | MS_NODEV, options.c_str()) == 0;
    if (mounted_ && (server_ = fork()) == 0) {
      alarm(60);
      serve(device, owner);
    }
    close(device);
  }
  ~FuseMount() {
    if (mounted_)
      umount2(directory_.c_str(), MNT_DETACH);
    if (server_ > 0) {
      kill(server_, SIGKILL);
      waitpid(server_, nullptr, 0);
    }
  }
  FuseMount(const FuseMount&) = delete;
  FuseMount& operator=(const FuseMount&) = delete;

  bool is_mounted() const { return mounted_; }

private:
  /// The few requests that a look at the root makes (include/uapi/linux/fuse.h).
  [[noreturn]] static void serve(int device, uid_t owner) {
    std::vector<char> request(FUSE_MIN_READ_BUFFER * 32);
    for (;;) {
      const ssize_t size = read(device, request.data(), request.size());
      if (size < 0 && errno == ENODEV) // unmounted
        _exit(0);
      if (size < static_cast<ssize_t>(sizeof(fuse_in_header)))
        continue;
      fuse_in_header in;
      std::memcpy(&in, request.data(), sizeof in);
      const auto answer = [&](const void* body, std::size_t body_size, int error) {
        std::vector<char> reply(sizeof(fuse_out_header) + body_size);
        fuse_out_header out{};
        out.len = static_cast<std::uint32_t>(reply.size());
        out.error = -error;
        out.unique = in.unique;
        std::memcpy(reply.data(), &out, sizeof out);
        if (body_size > 0)
          std::memcpy(reply.data() + sizeof out, body, body_size);
        (void)!write(device, reply.data(), reply.size());
      };
      if (in.opcode == FUSE_INIT) {
        fuse_init_out out{};
        out.major = FUSE_KERNEL_VERSION;
        out.minor = FUSE_KERNEL_MINOR_VERSION;
        out.max_write = 4096;
        answer(&out, sizeof out, 0);
      } else if (in.opcode == FUSE_GETATTR) {
        fuse_attr_out out{};
        out.attr.ino = 1;
        out.attr.mode = S_IFDIR | 0700;
        out.attr.nlink = 2;
        out.attr.uid = out.attr.gid = owner;
        answer(&out, sizeof out, 0);
      } else if (in.opcode == FUSE_STATFS) {
        fuse_statfs_out out{};
        out.st.bsize = out.st.frsize = 4096;
        out.st.blocks = out.st.bfree = out.st.bavail = 1 << 20;
        answer(&out, sizeof out, 0);
      } else if (in.opcode == FUSE_LOOKUP) {
        answer(nullptr, 0, ENOENT);
      } else if (in.opcode != FUSE_FORGET && in.opcode != FUSE_BATCH_FORGET) {
        answer(nullptr, 0, ENOSYS);
      }
    }
  }

  const std::string directory_;
  bool mounted_ = false;
  pid_t server_ = -1;
};

} // namespace kiln::test
