# A template for a tap: VERSION and SHA256 are those of the source archive on PyPI.
class MlxDiffusiongemma < Formula
  desc "Google's block-diffusion language model DiffusionGemma on MLX"
  homepage "https://pypi.org/project/mlx-diffusiongemma/"
  url "https://files.pythonhosted.org/packages/source/m/mlx-diffusiongemma/mlx_diffusiongemma-@VERSION@.tar.gz"
  sha256 "@SHA256@"
  license "MIT"

  depends_on arch: :arm64
  depends_on macos: :sonoma
  depends_on "python@3.12"

  # MLX and tokenizers are wheels with compiled code, signed as they are; relocating them would break the signatures.
  skip_clean "libexec"

  def install
    python = Formula["python@3.12"].opt_bin/"python3.12"
    system python, "-m", "venv", libexec
    system libexec/"bin/pip", "install", "--no-cache-dir", "#{buildpath}[server]"
    bin.install_symlink Dir[libexec/"bin/mlx_diffusiongemma*"]
  end

  service do
    run [opt_bin/"mlx_diffusiongemma.server", "--model", "mlx-community/diffusiongemma-26B-A4B-it-4bit",
         "--port", "1234", "--ttl", "3600"]
    keep_alive successful_exit: false
    log_path var/"log/mlx-diffusiongemma.log"
    error_log_path var/"log/mlx-diffusiongemma.log"
    environment_variables PYTHONUNBUFFERED: "1"
  end

  test do
    output = shell_output("#{bin}/mlx_diffusiongemma.generate --model tiny --verbose False --seed 1 -p 'Hello!'")
    assert_match "Hello", output
  end
end
